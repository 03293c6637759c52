"""Stage folders: done means a manifest, an interrupted one is redone, others' files are kept."""

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


def write(folder, text="whole", settings=SETTINGS):
    """A finished folder with one file."""
    store.begin_stage(folder, SETTINGS)
    (folder / "part").write_text(text)
    files = store.hash_files(folder, ["part"])
    store.finish_stage(folder, stage="import", settings=settings, files=files, facts={"layers": 4})
    return folder


def refusal(action, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        action(*arguments)
    said = str(caught.value)
    assert said and "\n" not in said
    return said


def test_a_folder_is_done_once_its_manifest_is_there_and_not_before(tmp_path):
    folder = tmp_path / "work" / "megatron"
    assert not store.is_done(folder, SETTINGS)
    store.begin_stage(folder, SETTINGS)
    assert store.in_progress_marker(folder).is_file() and folder.is_dir()
    (folder / "part").write_text("half")
    assert store.read_manifest(folder) is None
    assert not store.is_done(folder, SETTINGS)
    write(folder)
    assert store.is_done(folder, SETTINGS)
    assert not store.in_progress_marker(folder).exists()
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "part"]


def test_an_interrupted_folder_is_emptied_and_redone(tmp_path):
    folder = tmp_path / "megatron"
    store.begin_stage(folder, SETTINGS)
    (folder / "left").mkdir()
    (folder / "left" / "over").write_text("half")
    assert not store.is_done(folder, SETTINGS)
    store.begin_stage(folder, SETTINGS)
    assert list(folder.iterdir()) == []
    write(folder)
    assert store.is_done(folder, SETTINGS)


def test_the_manifest_tells_what_was_written_from_what_and_with_what(tmp_path):
    folder = write(tmp_path / "megatron")
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256(b"whole").hexdigest()
    assert manifest["files"] == {"part": {"bytes": 5, "sha256": digest}}
    assert (manifest["stage"], manifest["bytes"]) == ("import", 5)
    assert manifest["settings"] == {"model": "a", "targets": ["trtllm", "hf"], "moments": True}
    assert manifest["facts"] == {"layers": 4}
    assert manifest["versions"]["torch"] == metadata.version("torch")
    whole = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert store.hash_manifest(folder) == whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "b"}, "model='a', the recipe says 'b'"),
        ({"moments": False}, "moments=True, the recipe says False"),
        ({"targets": ["hf"]}, "targets=['trtllm', 'hf'], the recipe says ['hf']"),
        ({"dtype": "float16"}, "dtype=None, the recipe says 'float16'"),
    ],
)
def test_a_folder_made_with_other_settings_is_refused_with_the_key_and_both_values(
    tmp_path, change, said
):
    folder = write(tmp_path / "megatron")
    assert refusal(store.is_done, folder, SETTINGS | change) == (
        f"{folder} exists and was made with {said}; remove the folder or choose another workdir"
    )
    assert (folder / "part").read_text() == "whole"


def test_a_folder_with_files_that_are_not_ours_is_refused_and_left_alone(tmp_path):
    folder = tmp_path / "megatron"
    folder.mkdir()
    assert not store.is_done(folder, SETTINGS)
    (folder / "thesis.tex").write_text("years of work")
    assert refusal(store.is_done, folder, SETTINGS) == (
        f"output folder {folder} exists and is not ours; choose another workdir"
    )
    assert (folder / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("text", ['{"name": "my app", "version": 2}', "[]", "", '{"settings'])
def test_a_manifest_that_is_not_ours_or_cut_short_is_refused_by_name(tmp_path, text):
    folder = tmp_path / "megatron"
    folder.mkdir()
    (folder / "manifest.json").write_text(text)
    assert str(folder) in refusal(store.is_done, folder, SETTINGS)
    assert (folder / "manifest.json").read_text() == text


def test_a_file_where_a_folder_should_go_is_refused_by_name(tmp_path):
    place = tmp_path / "work"
    place.write_text("a file")
    for folder in (place, place / "megatron"):

        def open_folder(folder=folder):
            if not store.is_done(folder, SETTINGS):
                store.begin_stage(folder, SETTINGS)

        assert str(place) in refusal(open_folder)
    assert place.read_text() == "a file"


def test_a_stage_before_that_has_not_finished_is_named(tmp_path):
    folder = tmp_path / "megatron"
    said = f"{folder} is not finished; run the stage 'import' first"
    assert refusal(store.require_manifest, folder, "import") == said
    store.begin_stage(folder, SETTINGS)
    (folder / "part").write_text("half")
    assert refusal(store.require_manifest, folder, "import") == said
    write(folder)
    assert store.require_manifest(folder, "import")["stage"] == "import"


def test_saved_tensors_come_back_bit_for_bit_even_where_they_share_memory(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": whole, "again": whole, "row": whole[1], "turned": whole.T}
    path = tmp_path / "t.safetensors"
    store.save_tensors(tensors, path)
    found = load_file(path)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert path.stat().st_size < 1000  # a view is saved without what it is a view of


def test_saved_tensors_can_be_read_by_whom_the_umask_allows(tmp_path):
    path = tmp_path / "t.safetensors"
    before = os.umask(0o027)
    try:
        store.save_tensors({"a": torch.zeros(2)}, path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_json_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "config.json"
    store.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        store.write_json(path, {"a": object()})
    assert store.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
