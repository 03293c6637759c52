"""NeMo checkpoints as models: the bytes they hold, what is refused, pickles that are not run."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import models
import pytest
import torch
from nemo_folders import refusal

from nemo_vlm_ptq.checkpoints import torch_dist_index as torch_dist
from nemo_vlm_ptq.checkpoints import torch_dist_tensors as blocks
from nemo_vlm_ptq.checkpoints.huggingface import open_source
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.planning.plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.targets.nemo2.__main__ import write_checkpoint


@pytest.fixture
def copy(nemo_line, tmp_path):
    """The 16 bit checkpoint, to be damaged."""
    return Path(shutil.copytree(nemo_line / "nemo", tmp_path / "copy"))


def test_our_checkpoint_as_a_source_holds_the_bytes_it_came_from(nemo_line):
    mine = make_plan(Recipe(model=str(nemo_line / "nemo"), workdir="nowhere"))
    first = make_plan(Recipe(model=str(models.TINY_LLAVA), workdir="nowhere"))
    assert mine.decoder == first.decoder and mine.family is first.family
    assert set(mine.tensors) == set(first.tensors) and mine.dtype == first.dtype
    with open_source(mine.tensors) as ours, open_source(first.tensors) as theirs:
        for name in first.tensors:
            assert torch.equal(ours.whole(name), theirs.whole(name)), name


def test_a_source_of_nemo_is_imported_and_written_again_the_same(nemo_line, tmp_path):
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


def test_a_quantized_source_is_refused(nemo_line):
    said = refusal(nemo_line / "fp8" / "nemo")
    assert said.endswith("is quantized already; a model to quantize is in 16 bit")


def change(folder, edit):
    """io.json through a function of its text."""
    path = folder / "context" / "io.json"
    path.write_text(edit(path.read_text()))


def test_a_source_of_another_class_is_refused(copy):
    change(copy, lambda text: text.replace('"LlavaModel"', '"MLlamaModel"'))
    assert refusal(copy) == f"{copy} is NeMo's MLlamaModel; supported: LlavaModel"


def test_a_source_whose_decoder_is_another_is_refused(copy):
    change(copy, lambda text: text.replace('"LlamaConfig"', '"Llama31Config8B"'))
    assert "decoder Llama31Config8B is not supported; known: LlamaConfig," in refusal(copy)


def test_a_source_that_is_not_what_its_config_says_is_refused(copy):
    facts = json.loads((copy / "context" / "io.json").read_text())
    for entry in facts["objects"].values():
        for item in entry["items"]:
            if item[0] == "Attr(name='num_query_groups')":
                item[1]["value"] = 2
    (copy / "context" / "io.json").write_text(json.dumps(facts))
    said = refusal(copy)
    assert "linear_qkv.weight has shape (512, 256), io.json asks for (384, 256)" in said


def test_a_source_without_a_tokenizer_says_where_it_goes(copy):
    shutil.rmtree(copy / "context" / "tokenizer")
    said = refusal(copy)
    assert said.startswith(f"{copy}/context has no folder of the tokenizer; copy the files")
    assert said.endswith(f"to {copy}/context/tokenizer")


@pytest.mark.parametrize("text", ["[]", "{}", "no JSON", '{"root": {"type": "ref", "key": "a"}}'])
def test_an_io_json_that_is_none_is_refused(copy, text):
    (copy / "context" / "io.json").write_text(text)
    assert f"{copy}/context/io.json is" in refusal(copy)


# Nothing is loaded that can run code


class Run:
    """A pickle that would run a command."""

    def __reduce__(self):
        return os.system, ("touch was-run",)


def test_an_index_that_would_run_code_is_refused(copy, monkeypatch):
    monkeypatch.chdir(copy)
    (copy / "weights" / ".metadata").write_bytes(pickle.dumps(Run()))
    assert refusal(copy).endswith(f"it asks for {os.system.__module__}.system")
    assert not (copy / "was-run").exists()


def test_a_tensor_that_would_run_code_is_refused(copy, monkeypatch):
    monkeypatch.chdir(copy)
    index = torch_dist.read_index(copy / "weights")
    place = index.tensors["module.vision_projection.0.bias"].chunks[0].place
    torch.save(Run(), copy / "bad")
    raw = bytearray(place.file.read_bytes())
    bad = (copy / "bad").read_bytes()
    raw[place.offset : place.offset + place.length] = bad[: place.length].ljust(place.length)
    place.file.write_bytes(raw)
    with pytest.raises(UserError, match="is damaged at byte"):
        blocks.read_tensor(index.tensors["module.vision_projection.0.bias"])
    assert not (copy / "was-run").exists()


def test_nemos_own_records_of_how_it_saved_are_passed_over():
    raw = (
        b"\x80\x04\x8c3megatron.core.dist_checkpointing.strategies.torch"
        b"\x8c\x0dMCoreMetadata\x93)\x81."
    )
    raw = raw.replace(
        b"\x8c3", b"\x8c" + bytes([len("megatron.core.dist_checkpointing.strategies.torch")])
    )

    torch_dist._Unpickler(io.BytesIO(raw)).load()


def test_a_truncated_file_is_refused(copy):
    path = copy / "weights" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is truncated" in refusal(copy)


def test_a_file_that_is_not_there_is_refused(copy):
    (copy / "weights" / "__0_0.distcp").unlink()
    assert "names '__0_0.distcp', which is not there" in refusal(copy)
