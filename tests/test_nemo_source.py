"""NeMo 2 checkpoints as source models: import, rejected sources, and pickles that run no code."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import models
import pytest
import torch
from nemo_folders import error_message

from nemo_vlm_ptq.checkpoints import torch_dist_index as torch_dist
from nemo_vlm_ptq.checkpoints import torch_dist_tensors as blocks
from nemo_vlm_ptq.checkpoints.huggingface import open_source
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.nemo.checkpoint import write_checkpoint
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import Recipe


@pytest.fixture
def copy(nemo_line, tmp_path):
    """A copy of the 16 bit checkpoint."""
    return Path(shutil.copytree(nemo_line / "nemo", tmp_path / "copy"))


def test_source_equals_the_model_that_was_exported(nemo_line):
    exported = make_plan(Recipe(model=str(nemo_line / "nemo"), workdir="nowhere"))
    original = make_plan(Recipe(model=str(models.TINY_LLAVA), workdir="nowhere"))
    assert exported.decoder == original.decoder and exported.family is original.family
    assert set(exported.tensors) == set(original.tensors) and exported.dtype == original.dtype
    with open_source(exported.tensors) as actual, open_source(original.tensors) as expected:
        for name in original.tensors:
            assert torch.equal(actual.get_tensor(name), expected.get_tensor(name)), name


def test_source_is_imported_and_exported_unchanged(nemo_line, tmp_path):
    write_checkpoint("quickstart", [f"model={nemo_line / 'nemo'}", f"workdir={tmp_path}"])
    first, second = (
        torch_dist.read_index(home / "nemo" / "weights").tensors for home in (nemo_line, tmp_path)
    )
    assert set(first) == set(second)
    for name in first:
        one, two = map(blocks.read_tensor, (first[name], second[name]))
        assert torch.equal(one, two), name
    files = ("io.json", "model.yaml", "tokenizer/preprocessor_config.json")
    for file in files:
        one, two = (home / "nemo" / "context" / file for home in (nemo_line, tmp_path))
        assert one.read_bytes() == two.read_bytes(), file


def test_quantized_source_is_rejected(nemo_line):
    message = error_message(nemo_line / "fp8" / "nemo")
    assert message.endswith("is already quantized; the source model must be in 16 bit")


def edit_io_json(folder, edit):
    """Replace the text of io.json by a function of it."""
    path = folder / "context" / "io.json"
    path.write_text(edit(path.read_text()))


def test_source_of_another_class_is_rejected(copy):
    edit_io_json(copy, lambda text: text.replace('"LlavaModel"', '"MLlamaModel"'))
    expected = f"{copy}: unsupported NeMo model MLlamaModel; supported: LlavaModel"
    assert error_message(copy) == expected


def test_source_with_another_decoder_is_rejected(copy):
    edit_io_json(copy, lambda text: text.replace('"LlamaConfig"', '"Llama31Config8B"'))
    assert "unsupported decoder Llama31Config8B; supported: LlamaConfig," in error_message(copy)


def test_source_whose_weights_contradict_its_config_is_rejected(copy):
    content = json.loads((copy / "context" / "io.json").read_text())
    for entry in content["objects"].values():
        for item in entry["items"]:
            if item[0] == "Attr(name='num_query_groups')":
                item[1]["value"] = 2
    (copy / "context" / "io.json").write_text(json.dumps(content))
    message = error_message(copy)
    assert "linear_qkv.weight must have shape (384, 256)" in message
    assert message.endswith("got (512, 256)")


def test_source_without_tokenizer_is_rejected(copy):
    shutil.rmtree(copy / "context" / "tokenizer")
    message = error_message(copy)
    assert message.startswith(f"{copy}/context has no tokenizer folder; copy tokenizer and")
    assert message.endswith(f"to {copy}/context/tokenizer")


@pytest.mark.parametrize("text", ["[]", "{}", "no JSON", '{"root": {"type": "ref", "key": "a"}}'])
def test_invalid_io_json_is_rejected(copy, text):
    (copy / "context" / "io.json").write_text(text)
    assert f"{copy}/context/io.json is" in error_message(copy)


# Pickles must not run code


class Command:
    """Object whose pickle runs a command when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch was-run",)


def test_index_that_runs_code_is_rejected(copy, monkeypatch):
    monkeypatch.chdir(copy)
    (copy / "weights" / ".metadata").write_bytes(pickle.dumps(Command()))
    assert error_message(copy).endswith(f"unsupported global {os.system.__module__}.system")
    assert not (copy / "was-run").exists()


def test_tensor_that_runs_code_is_rejected(copy, monkeypatch):
    monkeypatch.chdir(copy)
    index = torch_dist.read_index(copy / "weights")
    byte_range = index.tensors["module.vision_projection.0.bias"].chunks[0].byte_range
    torch.save(Command(), copy / "bad")
    raw = bytearray(byte_range.file.read_bytes())
    bad = (copy / "bad").read_bytes()
    start, length = byte_range.offset, byte_range.length
    raw[start : start + length] = bad[:length].ljust(length)
    byte_range.file.write_bytes(raw)
    with pytest.raises(UserError, match="is damaged at byte"):
        blocks.read_tensor(index.tensors["module.vision_projection.0.bias"])
    assert not (copy / "was-run").exists()


def test_metadata_classes_of_megatron_are_ignored():
    raw = (
        b"\x80\x04\x8c3megatron.core.dist_checkpointing.strategies.torch"
        b"\x8c\x0dMCoreMetadata\x93)\x81."
    )
    raw = raw.replace(
        b"\x8c3", b"\x8c" + bytes([len("megatron.core.dist_checkpointing.strategies.torch")])
    )
    torch_dist._RestrictedUnpickler(io.BytesIO(raw)).load()


def test_truncated_file_is_rejected(copy):
    path = copy / "weights" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is truncated" in error_message(copy)


def test_missing_file_is_rejected(copy):
    (copy / "weights" / "__0_0.distcp").unlink()
    assert "names '__0_0.distcp', which does not exist" in error_message(copy)
