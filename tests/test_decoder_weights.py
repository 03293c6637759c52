"""Weights of the decoder read from the source: shards, dtypes, and what is refused."""

import os

import pytest
import torch
from bad_models import TINY, copy_model, damage, said_by, write_recipe
from safetensors.torch import load_file

from nemo_vlm_ptq.constants import VOCAB_MULTIPLE
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.parameter_map.entries import expand_layers
from nemo_vlm_ptq.parameter_map.sharding import shard_tensor
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.sources.decoder_weights import open_weights, read_vision

CPU = torch.device("cpu")
FC1, FC2 = (f"decoder.layers.1.mlp.linear_{name}.weight" for name in ("fc1", "fc2"))
UP = "language_model.model.layers.1.mlp.up_proj.weight"
TOWER = "multi_modal_projector.linear_1.weight"


def plan_of(folder, model=TINY, *overrides):
    return make_plan(load_recipe(str(write_recipe(folder, model)), overrides))


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-phi", "tiny-vila"])
def test_shards_are_those_of_whole_tensors(tmp_path, name):
    plan = plan_of(tmp_path, TINY.parent / name, "export.targets=[hf]")
    sizes = plan.decoder.sizes(VOCAB_MULTIPLE)
    files = {tensor.file for tensor in plan.tensors.values()}
    stored = {path: load_file(path) for path in files}
    with open_weights(plan, CPU) as weights:
        for entry in expand_layers(plan.parameter_map, range(plan.decoder.layers)):
            sources = [plan.tensors[key] for key in entry.hf_names]
            parts = [stored[source.file][source.disk_name] for source in sources]
            for T in (1, 2):
                for t in range(T):
                    expected = shard_tensor(entry.sharding, parts, sizes, t, T)
                    found = weights.shard(entry.megatron_name, t, T)
                    assert torch.equal(found, expected), (entry.megatron_name, t, T)


def test_row_parallel_weights_are_sharded_along_outputs_for_calibration(tmp_path):
    with open_weights(plan_of(tmp_path), CPU) as weights:
        whole = weights.read([FC1, FC2])
        shards = [weights.shard(FC2, t, 2, by_output=True) for t in range(2)]
        assert torch.equal(torch.cat(shards), whole[FC2])
        assert torch.equal(torch.cat([weights.shard(FC2, t, 2) for t in range(2)], 1), whole[FC2])
        for t in range(2):
            assert torch.equal(weights.shard(FC1, t, 2, by_output=True), weights.shard(FC1, t, 2))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_cast_to_the_dtype_of_the_recipe(tmp_path, dtype):
    plan = plan_of(tmp_path, TINY, f"export.dtype={dtype}")
    stored = load_file(TINY / "model.safetensors")
    with open_weights(plan, CPU) as weights:
        _, up = weights.shard(FC1).chunk(2)
        assert torch.equal(up, stored[UP].to(getattr(torch, dtype)))
    vision = read_vision(plan)
    assert list(vision) == sorted(plan.vision_names)
    assert {tensor.dtype for tensor in vision.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "holds NaN or Inf"),
        (3e38, "holds values beyond the range of torch.float16; set export.dtype=bfloat16"),
    ],
)
def test_a_value_that_cannot_be_stored_is_refused_by_the_shard_that_has_it(
    tmp_path, value, message
):
    model = damage(
        copy_model(tmp_path / "model"), lambda tensors: tensors[UP][-1, -1:].fill_(value)
    )
    plan = plan_of(tmp_path, model, "export.dtype=float16")
    with open_weights(plan, CPU) as weights:
        weights.shard(FC1, 0, 2)
        said = said_by(weights.shard, FC1, 1, 2)
    assert said == f"tensor {UP} {message}"


def test_a_tower_that_cannot_be_stored_is_refused(tmp_path):
    model = damage(
        copy_model(tmp_path / "model"), lambda tensors: tensors[TOWER].fill_(float("inf"))
    )
    assert said_by(read_vision, plan_of(tmp_path, model)) == f"tensor {TOWER} holds NaN or Inf"


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    model = copy_model(tmp_path / "model")
    plan, path = plan_of(tmp_path, model), model / "model.safetensors"
    with (
        pytest.raises(UserError, match=f"^{path} was changed while it was read; run the command"),
        open_weights(plan, CPU) as weights,
    ):
        weights.shard(FC1)
        os.utime(path, ns=(1, 1))
