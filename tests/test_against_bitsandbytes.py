"""NF4 exports equal bitsandbytes' serialization, and bitsandbytes dequantizes them equally."""

import json

import bitsandbytes.functional as bnb
import encoded_models
import models
import pytest
import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.targets.hf import nf4
from nemo_vlm_ptq.targets.hf.reader import read_unified
from nemo_vlm_ptq.targets.writing.nf4_encoding import quantize_nf4

QUANT_STATE = "weight.quant_state.bitsandbytes__nf4"


def linear_state(tensors, prefix):
    """Return the packed weight and bitsandbytes' QuantState of one linear."""
    linear = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    weight = linear.pop("weight")
    state = {name.removeprefix("weight."): tensor.clone() for name, tensor in linear.items()}
    return weight, bnb.QuantState.from_dict(state, device=torch.device("cpu"))


def dequantize_by_bitsandbytes(tensors, prefix):
    return bnb.dequantize_4bit(*linear_state(tensors, prefix)).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(192, 320), (8, 64)])
def test_tensors_equal_those_of_bitsandbytes(shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=dtype)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    expected = {"weight": packed}
    expected |= {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    codes, _, nested_absmax = quantize_nf4(weight)
    actual = nf4.linear_tensors(codes, nested_absmax, dtype)
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        same_layout = (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape)
        assert same_layout or name == QUANT_STATE
    for name in ("weight.quant_map", "weight.nested_quant_map"):
        assert torch.equal(actual[name], expected[name]), name
    difference = actual["weight.absmax"].int() - expected["weight.absmax"].int()
    assert int(difference.abs().amax()) <= 1  # the mean is summed in another order
    nested = "weight.nested_absmax"
    assert torch.allclose(actual[nested], expected[nested], rtol=1e-5)
    found, required = (json.loads(bytes(one[QUANT_STATE].tolist())) for one in (actual, expected))
    assert found.pop("nested_offset") == pytest.approx(required.pop("nested_offset"), rel=1e-6)
    assert found == required


def test_error_is_smaller_than_that_of_bitsandbytes():
    """bitsandbytes encodes with the exact absmax, this package with the dequantized one."""
    torch.manual_seed(0)
    weight = torch.randn(192, 320)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    codes, _, nested_absmax = quantize_nf4(weight)
    tensors = nf4.linear_tensors(codes, nested_absmax, weight.dtype)
    error = (dequantize_by_bitsandbytes(tensors, "") - weight).norm()
    assert error < (bnb.dequantize_4bit(packed, state) - weight).norm()


@pytest.mark.parametrize("family", encoded_models.DECODERS)
def test_bitsandbytes_and_reference_reader_dequantize_equally(tmp_path, family):
    encoded_models.write_hf(tmp_path / "hf", encoded_models.random_model(FORMATS["nf4"], family))
    tensors = load_file(tmp_path / "hf" / models.WEIGHTS)
    linears = read_unified(tmp_path / "hf", FAMILIES[family]).linears
    assert len(linears) == {"llava": 14, "phi": 8}[family]
    for name, linear in linears.items():
        weight = linear.dequantize().weight
        assert torch.equal(dequantize_by_bitsandbytes(tensors, f"{name}."), weight), name


def test_transformers_loads_an_export(export):
    """The decoder's linears become Linear4bit with equal values; nothing else is quantized."""
    from transformers import AutoModelForImageTextToText

    exported = export("nf4", "hf")
    model = AutoModelForImageTextToText.from_pretrained(exported.folder, device_map="cpu")
    linears = exported.read()[0].linears
    modules = {}
    for name in linears:
        path = models.transformers5_name(f"{name}.weight").removesuffix(".weight")
        modules[name] = model.get_submodule(path)
    others = [
        module
        for module in model.modules()
        if type(module).__name__ == "Linear4bit" and module not in modules.values()
    ]
    assert len(linears) == 28 and not others
    for name, linear in linears.items():
        weight = modules[name].weight
        found = bnb.dequantize_4bit(weight.data, weight.quant_state).float()
        assert torch.equal(found, linear.dequantize().weight)
    assert model(input_ids=torch.arange(20)[None]).logits.isfinite().all()
