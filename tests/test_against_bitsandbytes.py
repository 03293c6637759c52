"""NF4 exports are what bitsandbytes serializes, and bitsandbytes reads them to our values."""

import json

import bitsandbytes.functional as bnb
import models
import pytest
import streams
import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.targets.hf import nf4
from nemo_vlm_ptq.targets.hf.reader import read_unified

STATE = "weight.quant_state.bitsandbytes__nf4"


def linear_of(tensors, start):
    """(packed weight, bitsandbytes' state) of one linear."""
    own = {key.removeprefix(start): one for key, one in tensors.items() if key.startswith(start)}
    weight = own.pop("weight")
    state = {key.removeprefix("weight."): one.clone() for key, one in own.items()}
    return weight, bnb.QuantState.from_dict(state, device=torch.device("cpu"))


def read_by_bitsandbytes(tensors, start):
    return bnb.dequantize_4bit(*linear_of(tensors, start)).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(192, 320), (8, 64)])
def test_tensors_are_those_that_bitsandbytes_serializes(shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=dtype)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    theirs = {"weight": packed}
    theirs |= {f"weight.{key}": one for key, one in state.as_dict(packed=True).items()}
    codes, _, double = nf4.quantize(weight)
    mine = nf4.tensors(codes, double, dtype)
    assert set(mine) == set(theirs)
    for key, tensor in theirs.items():
        assert (mine[key].dtype == tensor.dtype and mine[key].shape == tensor.shape) or key == STATE
    for key in ("weight.quant_map", "weight.nested_quant_map"):
        assert torch.equal(mine[key], theirs[key]), key
    apart = mine["weight.absmax"].int() - theirs["weight.absmax"].int()
    assert int(apart.abs().amax()) <= 1  # means are summed in another order
    assert torch.allclose(mine["weight.nested_absmax"], theirs["weight.nested_absmax"], rtol=1e-5)
    found, expected = (json.loads(bytes(one[STATE].tolist())) for one in (mine, theirs))
    assert found.pop("nested_offset") == pytest.approx(expected.pop("nested_offset"), rel=1e-6)
    assert found == expected


def test_codes_are_nearer_than_those_of_bitsandbytes():
    """Its codes are of the absmax before that was rounded, ours of the one that is read."""
    torch.manual_seed(0)
    weight = torch.randn(192, 320)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    codes, _, double = nf4.quantize(weight)
    own = read_by_bitsandbytes(nf4.tensors(codes, double, weight.dtype), "")
    other = bnb.dequantize_4bit(packed, state)
    assert (own - weight).norm() < (other - weight).norm()


@pytest.mark.parametrize("family", streams.DECODERS)
def test_bitsandbytes_reads_every_linear_to_what_the_runtime_reads(tmp_path, family):
    stream = streams.random_stream(FORMATS["nf4"], family)
    streams.write_hf(tmp_path / "hf", stream)
    tensors = load_file(tmp_path / "hf" / models.WEIGHTS)
    linears = read_unified(tmp_path / "hf", FAMILIES[family]).linears
    assert len(linears) == {"llava": 14, "phi": 8}[family]
    for name, linear in linears.items():
        read = linear.values().weight
        assert torch.equal(read_by_bitsandbytes(tensors, f"{name}."), read), name


def test_transformers_loads_an_export_as_it_is(export):
    """Linears of layers as bitsandbytes', everything else as it was, and values equal to ours."""
    from transformers import AutoModelForImageTextToText

    written = export("nf4", "hf")
    model = AutoModelForImageTextToText.from_pretrained(written.folder, device_map="cpu")
    linears = written.read()[0].linears
    modules = {
        name: model.get_submodule(models.in_five(f"{name}.weight").removesuffix(".weight"))
        for name in linears
    }
    others = [
        one
        for one in model.modules()
        if type(one).__name__ == "Linear4bit" and one not in modules.values()
    ]
    assert len(linears) == 28 and not others
    for name, linear in linears.items():
        weight = modules[name].weight
        assert torch.equal(
            bnb.dequantize_4bit(weight.data, weight.quant_state).float(), linear.values().weight
        )
    assert model(input_ids=torch.arange(20)[None]).logits.isfinite().all()
