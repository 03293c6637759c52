"""Stage folders: a manifest finishes them, interrupted ones are redone, other files are kept."""

import hashlib
import json
import os
from importlib import metadata

import pytest
import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.workdir import store

SETTINGS = {"model": "a", "targets": ("trtllm", "hf"), "moments": True}


def finish(folder, text="complete"):
    """Return a finished stage folder with one file."""
    store.begin_stage(folder, SETTINGS)
    (folder / "part").write_text(text)
    files = store.hash_files(folder, ["part"])
    store.finish_stage(folder, stage="import", settings=SETTINGS, files=files, facts={"layers": 4})
    return folder


def error_message(function, *arguments) -> str:
    """Return the one-line message of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_a_folder_is_finished_only_with_its_manifest(tmp_path):
    folder = tmp_path / "work" / "megatron"
    assert not store.is_finished(folder, SETTINGS)
    store.begin_stage(folder, SETTINGS)
    assert store.in_progress_marker(folder).is_file() and folder.is_dir()
    (folder / "part").write_text("partial")
    assert store.read_manifest(folder) is None
    assert not store.is_finished(folder, SETTINGS)
    finish(folder)
    assert store.is_finished(folder, SETTINGS)
    assert not store.in_progress_marker(folder).exists()
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "part"]


def test_an_interrupted_folder_is_emptied_and_redone(tmp_path):
    folder = tmp_path / "megatron"
    store.begin_stage(folder, SETTINGS)
    (folder / "subfolder").mkdir()
    (folder / "subfolder" / "file").write_text("partial")
    assert not store.is_finished(folder, SETTINGS)
    store.begin_stage(folder, SETTINGS)
    assert list(folder.iterdir()) == []
    finish(folder)
    assert store.is_finished(folder, SETTINGS)


def test_the_manifest_records_files_settings_facts_and_versions(tmp_path):
    folder = finish(tmp_path / "megatron")
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256(b"complete").hexdigest()
    assert manifest["files"] == {"part": {"bytes": 8, "sha256": digest}}
    assert (manifest["stage"], manifest["bytes"]) == ("import", 8)
    assert manifest["settings"] == {"model": "a", "targets": ["trtllm", "hf"], "moments": True}
    assert manifest["facts"] == {"layers": 4}
    assert manifest["versions"]["torch"] == metadata.version("torch")
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert store.hash_manifest(folder) == digest


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"model": "b"}, "model='a', the recipe has 'b'"),
        ({"moments": False}, "moments=True, the recipe has False"),
        ({"targets": ["hf"]}, "targets=['trtllm', 'hf'], the recipe has ['hf']"),
        ({"dtype": "float16"}, "dtype=None, the recipe has 'float16'"),
    ],
)
def test_a_folder_made_with_other_settings_is_rejected_with_key_and_both_values(
    tmp_path, change, difference
):
    folder = finish(tmp_path / "megatron")
    assert error_message(store.is_finished, folder, SETTINGS | change) == (
        f"{folder} exists and was made with {difference}; choose another workdir, or "
        f"remove it: rm -r {folder}"
    )
    assert (folder / "part").read_text() == "complete"


def test_a_folder_with_files_of_the_user_is_rejected_and_unchanged(tmp_path):
    folder = tmp_path / "megatron"
    folder.mkdir()
    assert not store.is_finished(folder, SETTINGS)
    (folder / "thesis.tex").write_text("text")
    assert error_message(store.is_finished, folder, SETTINGS) == (
        f"output folder {folder} exists and was not finished by nemo-vlm-ptq; choose another "
        f"workdir, or, if nothing in it is yours: rm -r {folder}"
    )
    assert (folder / "thesis.tex").read_text() == "text"


@pytest.mark.parametrize("text", ['{"name": "my app", "version": 2}', "[]", "", '{"settings'])
def test_a_manifest_of_another_tool_or_truncated_is_rejected(tmp_path, text):
    folder = tmp_path / "megatron"
    folder.mkdir()
    (folder / "manifest.json").write_text(text)
    assert error_message(store.is_finished, folder, SETTINGS) == (
        f"{folder}/manifest.json is not a manifest written by nemo-vlm-ptq; choose another "
        f"workdir, or, if nothing in {folder} is yours: rm -r {folder}"
    )
    assert (folder / "manifest.json").read_text() == text


def test_a_file_in_place_of_a_folder_is_rejected(tmp_path):
    path = tmp_path / "work"
    path.write_text("a file")
    for folder in (path, path / "megatron"):

        def begin(folder=folder):
            if not store.is_finished(folder, SETTINGS):
                store.begin_stage(folder, SETTINGS)

        expected = f"{path} is a file, expected a folder; choose another workdir"
        assert error_message(begin) == expected
    assert path.read_text() == "a file"


def test_an_unfinished_input_stage_is_named(tmp_path):
    folder = tmp_path / "megatron"
    expected = f"{folder} is not finished; run the stage 'import' first"
    assert error_message(store.require_manifest, folder, "import") == expected
    store.begin_stage(folder, SETTINGS)
    (folder / "part").write_text("partial")
    assert error_message(store.require_manifest, folder, "import") == expected
    finish(folder)
    assert store.require_manifest(folder, "import")["stage"] == "import"


def test_saved_tensors_are_read_back_bit_for_bit_even_if_they_share_memory(tmp_path):
    matrix = torch.arange(12.0).reshape(3, 4)
    tensors = {"matrix": matrix, "alias": matrix, "row": matrix[1], "transposed": matrix.T}
    path = tmp_path / "t.safetensors"
    store.save_tensors(tensors, path)
    found = load_file(path)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert path.stat().st_size < 1000  # a view is saved without the rest of its storage


def test_permissions_of_saved_tensors_follow_the_umask(tmp_path):
    path = tmp_path / "t.safetensors"
    before = os.umask(0o027)
    try:
        store.save_tensors({"a": torch.zeros(2)}, path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_json_is_written_atomically(tmp_path):
    path = tmp_path / "config.json"
    store.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        store.write_json(path, {"a": object()})
    assert store.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
