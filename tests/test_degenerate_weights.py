"""Zeros, numbers near zero and outliers in a model are exported without NaN, and verify passes.

Layer 0 is pruned: rows, columns, groups and blocks of zeros, rows of subnormal numbers, a row with
one value, and one weight far above the others. Layer 1 is a new block whose output is zero, as
LLaMA-Pro inserts it, with a value projection of zeros: its KV cache and two inputs are zero.
"""

import json
import shutil

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from solving import observe_tokens, solve

from nemo_vlm_ptq.calibrate.solve.awq import candidate_scales
from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.formats import FORMATS, MIN_AMAX
from nemo_vlm_ptq.numerics import encode, scale_from_amax, weight_amax
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.stages import run_stages

LAYERS = "language_model.model.layers."
LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
TARGETS = ("trtllm", "hf", "compressed_tensors")


def prune(weight):
    weight[::7], weight[:, ::5], weight[:, 32:96], weight[8:24] = 0, 0, 0, 0
    weight[5], weight[6], weight[7] = 1e-40, weight[6] * 1e-30, weight[7] * 1e-9
    weight[25], weight[26] = 0, 0
    weight[25, 17], weight[26, 18], weight[27, 3] = 0.5, 1e-39, 8.0
    weight[30:40, :64], weight[30:40, 1] = 0, 4.5e-5


def write_model(folder):
    """Copy two layers of the tiny model with degenerate weights."""
    shutil.copytree(models.TINY_LLAVA, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / models.WEIGHTS)
    dropped = (f"{LAYERS}2.", f"{LAYERS}3.")
    tensors = {name: one for name, one in tensors.items() if not name.startswith(dropped)}
    for linear in LINEARS:
        prune(tensors[f"{LAYERS}0.{linear}.weight"])
    for linear in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        tensors[f"{LAYERS}1.{linear}.weight"].zero_()
    save_file(tensors, folder / models.WEIGHTS, {"format": "pt"})


def run_and_verify(home, work, formats, kv_cache="none"):
    recipe = Recipe(
        model=str(home / "model"),
        workdir=str(home / work),
        quantize={"format": formats, "kv_cache": kv_cache},
        calibration={"data": "scenes", "samples": 2, "micro_batch": 2},
        export={"targets": TARGETS, "tensor": 2},
    )
    with models.single_rank() as own:
        context = RunContext(plan=make_plan(recipe), parallel=own)
        run_stages(context, ("observe", "solve", "export"))
        for name in formats:
            single = recipe.model_copy(
                update={"quantize": recipe.quantize.model_copy(update={"format": (name,)})}
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("nemo_vlm_ptq.stages.verify.SAMPLE_COUNT", 2)
                try:
                    run_stages(RunContext(plan=make_plan(single), parallel=own), ("verify",))
                except VerificationError as error:
                    print(error)  # the tests read verify.json


@pytest.fixture(scope="module")
def degenerate(tmp_path_factory):
    """A folder with the work folders none (every format) and fp8 (int8_sq with that KV cache)."""
    home = tmp_path_factory.mktemp("degenerate")
    write_model(home / "model")
    run_and_verify(home, "none", tuple(FORMATS))
    run_and_verify(home, "fp8", ("int8_sq",), "fp8")
    return home


def failed_checks(folder):
    checks = json.loads((folder / "verify.json").read_text())["checks"]
    return [check for check in checks if not check["passed"]]


@pytest.mark.parametrize("name", FORMATS)
def test_the_export_of_degenerate_weights_passes_verify(degenerate, name):
    assert failed_checks(degenerate / "none" / name) == []


def test_a_kv_cache_of_zeros_passes_verify(degenerate):
    assert failed_checks(degenerate / "fp8" / "int8_sq") == []


@pytest.mark.parametrize("name", FORMATS)
def test_no_server_reads_nan_or_a_scale_that_is_not_positive(degenerate, name):
    files = sorted((degenerate / "none" / name).rglob("*.safetensors"))
    assert files
    for path in files:
        for key, tensor in load_file(path).items():
            if tensor.is_floating_point():
                assert tensor.float().isfinite().all(), key
            if "scale" in key.rpartition(".")[2] and tensor.is_floating_point():
                assert (tensor.float() > 0).all(), key


@pytest.mark.parametrize("name", FORMATS)
def test_errors_of_linears_without_output_are_numbers(degenerate, name):
    manifest = json.loads(
        (degenerate / "none" / name / "scales" / "manifest.json").read_text(),
        parse_constant=pytest.fail,
    )
    assert manifest["facts"]


@pytest.mark.parametrize("number_format", ["fp8", "int8", "int4", "nvfp4"])
@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-40, 1e-36, 1e-20, MIN_AMAX])
def test_weights_near_zero_become_codes_of_zero_with_a_normal_scale(number_format, amax):
    weight = torch.zeros(2, 32)
    weight[0, 3], weight[1, 5] = amax, -amax / 2
    found = weight_amax(weight, "tensor", 32)
    codes, scale = encode(weight, found, number_format), scale_from_amax(found, number_format)
    magnitude = codes.int() & 7 if number_format == "nvfp4" else codes.float()
    assert not magnitude.any() and scale > torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("name", ["int4_awq", "w4a8_awq", "int4_wo", "int8_wo", "fp8_pc_pt"])
def test_scales_of_zeros_do_not_stand_out(tmp_path, name, monkeypatch):
    import solving

    make_weights = solving.make_weights

    def with_zeros(dtype=torch.float32):
        weights = make_weights(dtype)
        for weight in weights.values():
            weight[3], weight[4, :32], weight[5] = 0, 0, 1e-40
        return weights

    monkeypatch.setattr(solving, "make_weights", with_zeros)
    for linear in solve(name, observe_tokens(tmp_path, whole=False)).values():
        amax = linear.weight_amax
        assert (amax > MIN_AMAX).all()
        assert (amax[3] == amax[5]).all() and amax[3].max() >= amax.max() / 2


def test_channels_without_effect_leave_the_scales_of_the_others():
    torch.manual_seed(0)
    weight, mean = torch.randn(64, 64) * 0.02, torch.rand(64) + 0.1
    pruned, dead = weight.clone(), mean.clone()
    pruned[:, 7], dead[9] = 0, 0
    plain, found = (
        candidate_scales(one, means, 32, None)([0.25, 0.5, 0.75])
        for one, means in ((weight, mean), (pruned, dead))
    )
    assert (found[:, [7, 9]] == 1).all()
    others = [index for index in range(64) if index not in (7, 9)]
    torch.testing.assert_close(found[:, others], plain[:, others], rtol=0.1, atol=0)
