"""Bad input: one line that says what and where, exit code 2, no folder that counts as finished."""

import json
import pickle
import re
import shutil
from pathlib import Path

import models
import pytest
import torch
from bad_models import (
    INDEX,
    TINY,
    WEIGHTS,
    copy_model,
    damage,
    error_message,
    plan_error,
    said_by,
    write_recipe,
)

from nemo_vlm_ptq.checkpoints.huggingface import list_tensors, open_source
from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families import read_config
from nemo_vlm_ptq.families.llava import FAMILY
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.stages.import_model import import_model

DOWN = "language_model.model.layers.2.mlp.down_proj.weight"
NORM = "language_model.model.norm.weight"
SHARD = "model-00001-of-00001.safetensors"
TOWER = "vision_tower.vision_model.post_layernorm.weight"


@pytest.fixture
def model(tmp_path):
    """A whole model folder, to be damaged."""
    return copy_model(tmp_path / "model")


# Folders


def test_a_model_folder_that_is_not_there_is_named(tmp_path):
    gone = tmp_path / "gone"
    said = error_message("run", write_recipe(tmp_path, gone))
    assert said == f"model folder {gone} does not exist"
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_hub_name_that_cannot_be_fetched_is_named_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = plan_error(tmp_path, "nobody/nothing")
    start = "model nobody/nothing is not a folder and could not be downloaded from the Hub: "
    assert said.startswith(start) and len(said) > len(start) + 10


def test_a_folder_without_a_config_is_no_model(tmp_path, model):
    (model / "config.json").unlink()
    said = f"{model} has no config.json; expected a Hugging Face model folder"
    assert plan_error(tmp_path, model) == said


@pytest.mark.parametrize("text", [b"{", b"", b"[]", b"3", b'"llava"', b"\xff\xfe"])
def test_a_config_that_is_no_json_object_is_named(tmp_path, model, text):
    (model / "config.json").write_bytes(text)
    assert plan_error(tmp_path, model).startswith(f"{model / 'config.json'} is not valid JSON")


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_a_folder_that_cannot_make_samples_is_named_with_what_it_lacks(model, name):
    (model / name).unlink()
    said = said_by(FAMILY.make_preprocessor, model, read_config(model))
    assert str(model) in said and name in said


# Weight files


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


PICKLE = "a pickle that can run code when loaded; convert it to safetensors first"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_pickle_is_rejected_and_never_loaded(tmp_path, model, name):
    (model / WEIGHTS).unlink()
    torch.save({"weight": Trap(tmp_path / "sprung")}, model / name)
    assert plan_error(tmp_path, model) == f"{model} holds {name}, {PICKLE}"
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("indexed", [False, True])
def test_a_pickle_under_another_name_is_no_safetensors_and_never_loaded(tmp_path, model, indexed):
    (model / WEIGHTS).unlink()
    name = "pytorch_model.bin" if indexed else WEIGHTS
    (model / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    if indexed:
        (model / INDEX).write_text(json.dumps({"weight_map": {NORM: name}}))
    said = plan_error(tmp_path, model)
    assert said == f"{model / name} is truncated or not a safetensors file"
    assert not (tmp_path / "sprung").exists()


def test_a_folder_without_weights_is_named(tmp_path, model):
    (model / WEIGHTS).unlink()
    assert plan_error(tmp_path, model) == f"{model} holds no .safetensors file"


def test_a_shard_cut_short_is_named_with_both_sizes(tmp_path, model):
    path = model / WEIGHTS
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(whole - 100)
    assert plan_error(tmp_path, model) == (
        f"{path} is truncated: {whole - 100} bytes, its header expects {whole}"
    )


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_a_shard_cut_in_its_header_is_named(tmp_path, model, size):
    path = model / WEIGHTS
    with path.open("r+b") as file:
        file.truncate(size)
    said = plan_error(tmp_path, model)
    assert said == f"{path} is truncated or not a safetensors file"


@pytest.mark.parametrize("text", ["[]", '{"a": 3}', '{"a": {}}', '{"a": {"data_offsets": "x"}}'])
def test_a_header_of_another_kind_is_named(tmp_path, model, text):
    path = model / WEIGHTS
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    assert plan_error(tmp_path, model).startswith(f"{path} is ")


@pytest.fixture
def sharded(model):
    """A model folder whose only weight file needs an index."""
    (model / WEIGHTS).rename(model / SHARD)
    return model


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors"])
def test_an_index_that_points_out_of_the_folder_is_rejected(tmp_path, sharded, name):
    model = sharded
    (tmp_path / "x.safetensors").write_bytes((model / SHARD).read_bytes())
    (model / INDEX).write_text(json.dumps({"weight_map": {NORM: name}}))
    said = plan_error(tmp_path, model)
    assert said == f"{model / INDEX} names {name!r}, a file outside the folder"


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "..", ".", "x" * 300])
def test_an_index_that_names_a_file_that_is_not_there_is_rejected(tmp_path, sharded, name):
    model = sharded
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": SHARD, NORM: name}}))
    said = plan_error(tmp_path, model)
    assert said.startswith(f"{model / INDEX} names '{name[:9]}")


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}']
)
def test_an_index_that_is_none_is_named(tmp_path, sharded, text):
    (sharded / INDEX).write_text(text)
    assert str(sharded / INDEX) in plan_error(tmp_path, sharded)


def test_files_may_be_links_as_in_the_cache_of_the_hub(tmp_path):
    repo = tmp_path / "models--a--b"
    folder = repo / "snapshots" / "0a"
    folder.mkdir(parents=True)
    shutil.copytree(TINY, repo / "blobs")
    for path in TINY.iterdir():
        (folder / path.name).symlink_to(f"../../blobs/{path.name}")
    (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: WEIGHTS}}))
    plan = make_plan(load_recipe(str(write_recipe(tmp_path, folder))))
    assert {tensor.file for tensor in plan.tensors.values()} == {folder / WEIGHTS}


# Tensors


def test_a_missing_tensor_is_named(tmp_path, model):
    damage(model, lambda tensors: [tensors.pop(name) for name in (NORM, TOWER)])
    assert plan_error(tmp_path, model) == f"{model}: missing tensor {NORM} (2 missing in total)"


def test_a_tensor_that_belongs_nowhere_is_named(tmp_path, model):
    name = "language_model.model.layers.0.self_attn.q_proj.bias"
    damage(model, lambda tensors: tensors.update({name: torch.zeros(256)}))
    said = plan_error(tmp_path, model)
    assert said == f"{model}: unexpected tensor {name} (1 in total)"


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path, model):
    damage(model, lambda tensors: tensors.update({DOWN: torch.zeros(256, 512)}))
    said = plan_error(tmp_path, model)
    assert said == f"{model}: tensor {DOWN} has shape (256, 512), expected (256, 768)"


def test_two_tensors_that_mean_the_same_are_named(tmp_path, model):
    damage(model, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(512, 256)}))
    said = plan_error(tmp_path, model)
    assert said.startswith(f"{model / WEIGHTS}: ") and "lm_head.weight" in said
    assert said.endswith("have the same name language_model.lm_head.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named_when_read(model, value):
    damage(model, lambda tensors: tensors[TOWER][-1:].fill_(value))
    with open_source(list_tensors(model, FAMILY.name_aliases)) as reader:
        assert reader.get_tensor(NORM).shape == (256,)
        assert said_by(reader.get_tensor, TOWER) == f"tensor {TOWER} holds NaN or Inf"


def test_a_number_that_float16_cannot_hold_is_told_by_its_tensor(tmp_path, model):
    damage(model, lambda tensors: tensors[DOWN][-1:].fill_(1e5))
    recipe = write_recipe(tmp_path, model, export={"dtype": "float16"})
    said = (
        f"tensor {DOWN} holds values beyond the range of torch.float16; set export.dtype=bfloat16"
    )
    with models.single_rank() as own, pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        import_model(RunContext(plan=make_plan(load_recipe(str(recipe))), parallel=own))


# Logits


def test_logits_rejects_inputs_that_are_not_there_and_forms_it_does_not_know(tmp_path):
    from nemo_vlm_ptq.stages.logits import write_logits

    options = {"from": "megatron", "inputs": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    said = f"inputs={tmp_path / 'in'} is not a file"
    assert said_by(write_logits, None, options) == said
    supported = "hf_source, megatron, quantized, compressed_tensors, hf, trtllm, nemo, engine"
    said = f"unknown form from=onnx; supported: {supported}"
    assert said_by(write_logits, None, options | {"from": "onnx"}) == said
    for key in options:
        rest = {name: value for name, value in options.items() if name != key}
        assert said_by(write_logits, None, rest).startswith(f"logits needs {key}=...")
    assert not (tmp_path / "out").exists()
