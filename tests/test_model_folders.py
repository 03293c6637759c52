"""Model folders as people have them: links, broken downloads, files of other programs."""

import json
import os
import shutil

import pytest
from bad_models import (
    INDEX,
    TINY,
    WEIGHTS,
    configure,
    copy_model,
    plan_error,
    said_by,
    write_recipe,
)

from nemo_vlm_ptq.checkpoints.huggingface import list_tensors
from nemo_vlm_ptq.checkpoints.model_folder import is_sidecar
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families import llava
from nemo_vlm_ptq.input_files import open_file, read_json
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.targets.writing.published import copy_missing

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 1842767\n"
READ = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "preprocessor_config.json", "processor_config.json", WEIGHTS),
)


@pytest.fixture
def model(tmp_path):
    return copy_model(tmp_path / "model")


def make(folder):
    """Plan a model folder, and load what preprocesses its questions."""
    recipe = write_recipe(folder.parent, folder)
    plan = make_plan(load_recipe(str(recipe)))
    return plan.family.make_preprocessor(plan.folder, plan.config)


def replaced(path, put):
    """What is said of a folder with one file replaced; the file is put back."""
    kept = path.with_name("kept")
    path.rename(kept)
    try:
        put(path)
        said = said_by(make, path.parent)
    finally:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        kept.rename(path)
    return said


def test_links_out_of_the_folder_are_refused(tmp_path, model):
    outside = tmp_path / "outside"
    shutil.copytree(TINY, outside)
    for name in READ:
        for target in (outside / name, f"../outside/{name}"):
            said = replaced(model / name, lambda path, target=target: path.symlink_to(target))
            assert said.startswith(f"{model / name} leads to {outside / name}, outside the model")
    (model / "chat_template.jinja").symlink_to(outside / "config.json")
    assert "chat_template.jinja leads to" in said_by(make, model)


def test_links_within_the_folder_are_followed(model):
    (model / "files").mkdir()
    for name in READ:
        (model / name).rename(model / "files" / name)
        (model / name).symlink_to(f"files/{name}")
    make(model)


def test_links_of_a_hub_snapshot_may_lead_to_the_blobs_of_its_repository_only(tmp_path):
    for name, leads in (("a", "a"), ("a", "b")):
        shutil.rmtree(tmp_path / "hub", ignore_errors=True)
        folder = tmp_path / "hub" / f"models--x--{name}" / "snapshots" / "1"
        folder.mkdir(parents=True)
        blobs = tmp_path / "hub" / f"models--x--{leads}" / "blobs"
        shutil.copytree(TINY, blobs)
        for path in TINY.iterdir():
            (folder / path.name).symlink_to(os.path.relpath(blobs / path.name, folder))
        recipe = load_recipe(str(write_recipe(tmp_path, folder)))
        if name == leads:
            make_plan(recipe)
        else:
            assert "outside the model folder" in said_by(make_plan, recipe)


def test_odd_files_are_named_without_waiting_for_them(tmp_path, model):
    puts = {
        os.mkfifo: "is a FIFO; expected a file",
        lambda path: path.mkdir(): "is a folder; expected a file",
        lambda path: path.symlink_to(path.name): "cannot be read: ",
        lambda path: path.symlink_to("not-there"): "cannot be read: No such file",
        lambda path: path.write_text(LFS): "is a pointer of git-lfs",
    }
    for name in READ:
        for put, expected in puts.items():
            said = replaced(model / name, put)
            assert f"{model / name}" in said and expected in said
    assert "is a device" in said_by(open_file, type(model)("/dev/zero"))


def test_a_file_that_may_not_be_read_is_named(model, monkeypatch):
    real = os.open

    def refuse(path, *arguments, **keywords):
        if os.path.basename(path) == "tokenizer.json":
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    assert said_by(make, model) == f"{model}/tokenizer.json cannot be read: Permission denied"


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("preprocessor_config.json", "processor_config.json", "added_tokens.json"),
    ],
)
def test_a_broken_download_is_told_in_one_line(tmp_path, model, name):
    path = model / name
    whole = path.read_bytes() if path.exists() else b'{"<x>": 5}'
    contents = [whole[:-20], b"", b"[]", b"3", b"null", b'{"a": NaN}', b"\xff\xfe" + whole]
    contents.append(b"[" * 100_000 + b"]" * 100_000)
    for content in contents:
        path.write_bytes(content)
        said = said_by(make, model)
        assert str(model) in said and len(said) < 700


def test_files_that_are_only_handed_on_must_be_readable_too(tmp_path, model):
    recipe = load_recipe(str(write_recipe(tmp_path, model)))
    contents = (b"", b"{", b"[]", b'{"top_p": NaN}', b'{"a": 1, "a": 2}', b"{}x", b'{"a": -1e999}')
    for name in ("generation_config.json", "chat_template.json", "added_tokens.json", "vocab.json"):
        whole = (model / name).read_bytes() if (model / name).exists() else b"{}"
        for content in contents:
            (model / name).write_bytes(content)
            assert said_by(make_plan, recipe).startswith(f"{model / name} is not valid JSON: ")
        (model / name).write_bytes(b"\xef\xbb\xbf{}")
        assert said_by(make_plan, recipe).startswith(
            f"{model / name} starts with a byte order mark"
        )
        (model / name).write_text("{}", encoding="utf-16")
        assert said_by(make_plan, recipe).startswith(f"{model / name} is not text in UTF-8")
        (model / name).write_bytes(whole)
    make_plan(recipe)
    for name in ("merges.txt", "vocab.txt", "chat_template.jinja"):
        (model / name).write_bytes(b"\xff\xfe")
        assert said_by(make_plan, recipe).startswith(f"{model / name} is not text in UTF-8")
        (model / name).unlink()


def test_what_the_tokenizer_library_prints_is_dropped(model, capfd):
    content = json.loads((model / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["w"] = vocab["v"]  # a hole in the ids, which the library prints a warning of
    (model / "tokenizer.json").write_text(json.dumps(content))
    assert "tokenizer cannot be loaded" in said_by(make, model)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" + "0" * 400 + ".0", "NaN", "Infinity"])
def test_numbers_that_json_cannot_hold_are_refused(tmp_path, number):
    path = tmp_path / "x.json"
    path.write_text(f'{{"a": [{number}]}}')
    assert said_by(read_json, path).startswith(f"{path} is not valid JSON: ")
    path.write_text('{"a": [1e308, 1e-999, -0.0, 1000000000000000019884624838656]}')
    assert read_json(path)["a"][1] == 0


@pytest.mark.parametrize("content", [b"", b"not sentencepiece", b"\x00" * 100])
def test_a_broken_sentencepiece_model_is_told_in_one_line(model, content):
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (model / name).unlink()
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (model / "tokenizer.model").write_bytes(content)
    assert said_by(make, model).startswith(f"{model}: the tokenizer cannot be loaded: ")


def test_only_known_files_are_handed_on(tmp_path, model):
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "chat_template.json").write_text("{}")
    (model / "modeling_own.py").write_text("")
    for name in (
        *("pytorch_model.bin.index.json", "secrets.json", "notes.txt", "run.py", "trainer.json"),
        *(INDEX, "flax_model.msgpack.index.json"),
    ):
        (model / name).write_text("{}")
    folder = tmp_path / "export"
    folder.mkdir()
    copied = copy_missing(model, folder, "", is_sidecar)
    expected = {*READ, "chat_template.jinja", "chat_template.json", "modeling_own.py"} - {WEIGHTS}
    assert set(copied) == expected == {path.name for path in folder.iterdir()}
    (model / "added_tokens.json").symlink_to("/etc/hostname")
    assert "outside the model folder" in said_by(copy_missing, model, folder, "", is_sidecar)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "awq"},
        {"quant_method": "gptq"},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "fp8"},
        {"bits": 4},
    ],
)
@pytest.mark.parametrize("where", ["", "text_config."])
def test_a_quantized_source_is_refused_by_name(model, quantization, where):
    configure(model, {f"{where}quantization_config": quantization})
    said = said_by(make, model)
    assert quantization.get("quant_method", "of an unknown method") in said
    assert "already quantized; start from one in 16 bit" in said


def test_an_empty_quantization_config_is_no_quantization(model):
    make(configure(model, {"quantization_config": None}))


def test_files_of_quantizers_and_adapters_are_refused(model):
    for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json"):
        (model / name).write_text("{}")
        assert f"{name}: the model is already quantized" in said_by(make, model)
        (model / name).unlink()
    for name in ("adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"):
        (model / name).write_text("{}")
        said = said_by(make, model)
        assert name in said and "LoRA adapter" in said and "merge" in said
        (model / name).unlink()


def test_weight_files_that_readers_ignore_are_ignored(model):
    for name in ("consolidated.safetensors", "._model.safetensors", ".hidden.safetensors"):
        shutil.copy(model / WEIGHTS, model / name)
    (model / WEIGHTS).rename(model / "model-00001-of-00001.safetensors")
    (model / "._model.safetensors").write_bytes(b"\0" * 200)
    found = list_tensors(model, llava.FAMILY.name_aliases)
    assert {one.file.name for one in found.values()} == {"model-00001-of-00001.safetensors"}


def test_names_longer_than_a_file_may_have_are_told_in_one_line(tmp_path):
    long = "x" * 300
    for word in (f"model={long}", f"model=/{long}", f"workdir={tmp_path}/{long}", "workdir=a\0b"):
        said = plan_error(tmp_path, TINY, word)
        assert len(said) < 700
    for key in ("calibration.data", "evaluate.data"):
        assert "existing folder" in plan_error(tmp_path, TINY, f"{key}={tmp_path}/{long}")
    with pytest.raises(UserError, match="is not a file"):
        load_recipe(long)
    for workdir in ("/dev/null/x", "/dev/null"):
        assert "is not a folder" in plan_error(tmp_path, TINY, f"workdir={workdir}")
