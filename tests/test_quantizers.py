"""A quantized Megatron model computes what its format means.

What it should compute is written out here from the rounding of numbers, which test_numerics.py
compares with those who wrote the formats.
"""

import copy

import models
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from modelopt.torch.quantization.nn import TensorQuantizer
from quantized_models import (
    CASES,
    DECODER,
    INPUT_TOP,
    KEY_TOP,
    SHAPES,
    VALUE_TOP,
    fill,
    quantized,
    random,
    rounded_part,
    whole_scales,
    whole_weight,
)

from nemo_vlm_ptq.calibrate.statistics import LINEARS
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import FORMATS, KV_CACHES
from nemo_vlm_ptq.numerics import fake_quantize, fake_quantize_nvfp4
from nemo_vlm_ptq.targets.megatron import quantizers


@pytest.fixture(scope="module")
def own():
    with models.alone() as parallel:
        yield parallel


def rounded_input(x, activation):
    """An input [S,1,K] as a format rounds it."""
    top = torch.tensor(INPUT_TOP)
    if activation is None:
        return x
    if activation == "nvfp4":
        return fake_quantize_nvfp4(x, top)
    flat = x.flatten(0, 1)
    if activation == "fp8_token":
        rows = [fake_quantize(one[None], one.abs().amax(), "fp8") for one in flat]
        return torch.cat(rows).view_as(x)
    return fake_quantize(flat, top, activation).view_as(x)


@pytest.mark.parametrize("name", FORMATS)
def test_a_linear_computes_what_its_format_means(own, name):
    row, dtype = FORMATS[name], torch.float32
    model = quantized(own, name, "none", dtype)
    quantizers.use_custom_backends(model, FORMATS[name])
    for layer, linear, module in quantizers._linears(model):
        scales = whole_scales(name, layer, linear, dtype)
        x = random(16, 1, SHAPES[linear][1], seed=5)
        scaled = x if scales.pre_quant_scale is None else x * scales.pre_quant_scale
        rest = rounded_part(
            whole_weight(layer, linear),
            scales.pre_quant_scale,
            scales.low_rank_a,
            scales.low_rank_b,
        )
        weight = fake_quantize(rest, scales.weight_amax, row.weight)
        if row.second_weight:
            weight = fake_quantize(weight, scales.weight_amax_2, row.second_weight)
        wanted = rounded_input(scaled, row.activation) @ weight.T
        if scales.low_rank_a is not None:
            wanted += scaled @ scales.low_rank_a.T @ scales.low_rank_b.T
        torch.testing.assert_close(module(x)[0], wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kv", KV_CACHES)
@pytest.mark.parametrize("name", ["fp8", "nf4"])
def test_attention_sees_keys_and_values_as_a_cache_holds_them(own, name, kv):
    model = quantized(own, name, kv, torch.float32)
    quantizers.use_custom_backends(model, FORMATS[name])
    core = model.decoder.layers[1].self_attention.core_attention
    q, k, v = (
        random(20, 2, 8, 32, seed=1),
        random(20, 2, 4, 32, seed=2),
        random(20, 2, 4, 32, seed=3),
    )

    def cached(x, top):
        if kv == "nvfp4":
            return fake_quantize_nvfp4(x, torch.tensor(top))
        return fake_quantize(x.flatten(0, 2), torch.tensor(top), KV_CACHES[kv].kind).view_as(x)

    def attend(keys, values):
        parts = (x.permute(1, 2, 0, 3) for x in (q, keys, values))
        out = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)

    wanted = attend(cached(k, KEY_TOP), cached(v, VALUE_TOP))
    torch.testing.assert_close(core(q, k, v, None), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted, attend(k, v), atol=1e-3)
    quantizers.disable_activation_quantizers(model)
    torch.testing.assert_close(core(q, k, v, None), attend(k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "kv"), CASES)
def test_just_the_linears_and_the_cache_are_quantized(own, name, kv):
    model, row = quantized(own, name, kv, torch.bfloat16), FORMATS[name]
    enabled = {
        key.removeprefix("decoder.layers.")
        for key, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and module.is_enabled
    }
    expected = set()
    for layer in range(DECODER.layers):
        for path in LINEARS.values() if row.modelopt_preset else ():
            both = [f"{layer}.{path}.weight_quantizer"]
            if row.second_weight:
                both = [f"{both[0]}.{index}" for index in range(2)]
            expected.update(both)
            if row.activation:
                expected.add(f"{layer}.{path}.input_quantizer")
        if kv != "none":
            core = f"{layer}.self_attention.core_attention"
            expected.update((f"{core}.k_bmm_quantizer", f"{core}.v_bmm_quantizer"))
    assert enabled == expected
    if kv == "none":
        assert not any("bmm" in key for key, _ in model.named_modules())


def test_a_quantizer_too_many_is_refused(own):
    model = quantized(own, "int8_wo", "none", torch.float32)
    model.output_layer.input_quantizer.enable()
    with pytest.raises(UserError, match="9 quantizers are enabled, 8 were expected"):
        fill(model, own, "int8_wo", "none", torch.float32)


def test_nf4_leaves_the_values_that_its_codes_stand_for(own):
    model = quantized(own, "nf4", "none", torch.bfloat16)
    assert not any(isinstance(module, TensorQuantizer) for module in model.modules())
    for layer, linear, module in quantizers._linears(model):
        scales = whole_scales("nf4", layer, linear, torch.bfloat16)
        weight = whole_weight(layer, linear).bfloat16()
        wanted = fake_quantize(weight, scales.weight_amax, "nf4").bfloat16()
        assert torch.equal(module.weight, wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_get_the_codes_of_what_was_divided_and_had_its_branch_taken_off(own, name):
    model, row = quantized(own, name, "none", torch.bfloat16), FORMATS[name]
    for layer, linear, module in quantizers._linears(model):
        scales = whole_scales(name, layer, linear, torch.bfloat16)
        rest = rounded_part(
            whole_weight(layer, linear).bfloat16(),
            scales.pre_quant_scale,
            scales.low_rank_a,
            scales.low_rank_b,
        )
        wanted = fake_quantize(rest, scales.weight_amax, row.weight)
        found = module.weight.float()
        if row.modelopt_preset:
            assert (found - rest.float()).abs().max() <= 2.0**-7 * rest.float().abs().max()
            found = fake_quantize(module.weight, scales.weight_amax, row.weight)
        assert torch.equal(found.bfloat16(), wanted.bfloat16())


def test_modelopts_presets_stay_as_they_are(own):
    import modelopt.torch.quantization as mtq

    names = {row.modelopt_preset for row in FORMATS.values()} - {""}
    names |= {"FP8_KV_CFG", "NVFP4_KV_CFG"}
    before = {name: copy.deepcopy(getattr(mtq, name)) for name in names}
    for row in FORMATS.values():
        for kv in (None, *KV_CACHES.values()):
            config = quantizers.preset(row, 32, kv)
            for entry in config["quant_cfg"]:
                parts = entry.get("cfg") or {}
                for part in parts if isinstance(parts, list) else [parts]:
                    block = part.get("block_sizes", {})
                    assert block.get(-1) in (None, 16 if "scale_bits" in block else 32)
    assert before == {name: getattr(mtq, name) for name in names}
