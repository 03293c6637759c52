"""A quantized Megatron model computes what its format defines.

Expected results are computed here from the fake quantization of numerics.py, which
test_numerics.py compares with independent implementations of each number format.
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
    INPUT_AMAX,
    KEY_AMAX,
    SHAPES,
    VALUE_AMAX,
    fill_quantizers,
    quantized_model,
    random_tensor,
    residual_weight,
    whole_scales,
    whole_weight,
)

from nemo_vlm_ptq.calibrate.statistics import LINEARS
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import FORMATS, KV_CACHES
from nemo_vlm_ptq.numerics import fake_quantize, fake_quantize_nvfp4
from nemo_vlm_ptq.targets.megatron import quantizers


@pytest.fixture(scope="module")
def parallel():
    with models.single_rank() as parallel:
        yield parallel


def fake_quantize_input(x, activation):
    """Fake-quantize an input [S,1,K]."""
    amax = torch.tensor(INPUT_AMAX)
    if activation is None:
        return x
    if activation == "nvfp4":
        return fake_quantize_nvfp4(x, amax)
    tokens = x.flatten(0, 1)
    if activation == "fp8_token":
        rows = [fake_quantize(token[None], token.abs().amax(), "fp8") for token in tokens]
        return torch.cat(rows).view_as(x)
    return fake_quantize(tokens, amax, activation).view_as(x)


@pytest.mark.parametrize("name", FORMATS)
def test_linear_matches_its_format(parallel, name):
    fmt, dtype = FORMATS[name], torch.float32
    model = quantized_model(parallel, name, "none", dtype)
    quantizers.use_custom_backends(model, fmt)
    for layer, linear, module in quantizers.decoder_linears(model):
        scales = whole_scales(name, layer, linear, dtype)
        x = random_tensor(16, 1, SHAPES[linear][1], seed=5)
        scaled = x if scales.pre_quant_scale is None else x * scales.pre_quant_scale
        residual = residual_weight(
            whole_weight(layer, linear),
            scales.pre_quant_scale,
            scales.low_rank_a,
            scales.low_rank_b,
        )
        weight = fake_quantize(residual, scales.weight_amax, fmt.weight)
        if fmt.second_weight:
            weight = fake_quantize(weight, scales.weight_amax_2, fmt.second_weight)
        expected = fake_quantize_input(scaled, fmt.activation) @ weight.T
        if scales.low_rank_a is not None:
            expected += scaled @ scales.low_rank_a.T @ scales.low_rank_b.T
        torch.testing.assert_close(module(x)[0], expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("name", ["fp8", "nf4"])
def test_attention_uses_quantized_keys_and_values(parallel, name, kv_cache):
    model = quantized_model(parallel, name, kv_cache, torch.float32)
    quantizers.use_custom_backends(model, FORMATS[name])
    core_attention = model.decoder.layers[1].self_attention.core_attention
    number_format = KV_CACHES[kv_cache].number_format
    q, k, v = (
        random_tensor(20, 2, 8, 32, seed=1),
        random_tensor(20, 2, 4, 32, seed=2),
        random_tensor(20, 2, 4, 32, seed=3),
    )

    def quantize(x, amax):
        if kv_cache == "nvfp4":
            return fake_quantize_nvfp4(x, torch.tensor(amax))
        return fake_quantize(x.flatten(0, 2), torch.tensor(amax), number_format).view_as(x)

    def attend(keys, values):
        parts = (x.permute(1, 2, 0, 3) for x in (q, keys, values))
        out = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)

    expected = attend(quantize(k, KEY_AMAX), quantize(v, VALUE_AMAX))
    torch.testing.assert_close(core_attention(q, k, v, None), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, attend(k, v), atol=1e-3)
    quantizers.disable_activation_quantizers(model)
    torch.testing.assert_close(core_attention(q, k, v, None), attend(k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "kv_cache"), CASES)
def test_only_linears_and_kv_cache_are_quantized(parallel, name, kv_cache):
    model = quantized_model(parallel, name, kv_cache, torch.bfloat16)
    fmt = FORMATS[name]
    enabled = {
        key.removeprefix("decoder.layers.")
        for key, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and module.is_enabled
    }
    expected = set()
    for layer in range(DECODER.layers):
        for path in LINEARS.values() if fmt.modelopt_preset else ():
            weight_quantizers = [f"{layer}.{path}.weight_quantizer"]
            if fmt.second_weight:
                weight_quantizers = [f"{weight_quantizers[0]}.{index}" for index in range(2)]
            expected.update(weight_quantizers)
            if fmt.activation:
                expected.add(f"{layer}.{path}.input_quantizer")
        if kv_cache != "none":
            core = f"{layer}.self_attention.core_attention"
            expected.update((f"{core}.k_bmm_quantizer", f"{core}.v_bmm_quantizer"))
    assert enabled == expected
    if kv_cache == "none":
        assert not any("bmm" in key for key, _ in model.named_modules())


def test_unexpected_quantizer_is_rejected(parallel):
    model = quantized_model(parallel, "int8_wo", "none", torch.float32)
    model.output_layer.input_quantizer.enable()
    with pytest.raises(UserError, match="9 quantizers are enabled, expected 8"):
        fill_quantizers(model, parallel, "int8_wo", "none", torch.float32)


def test_nf4_weights_are_fake_quantized_without_quantizers(parallel):
    model = quantized_model(parallel, "nf4", "none", torch.bfloat16)
    assert not any(isinstance(module, TensorQuantizer) for module in model.modules())
    for layer, linear, module in quantizers.decoder_linears(model):
        scales = whole_scales("nf4", layer, linear, torch.bfloat16)
        weight = whole_weight(layer, linear).bfloat16()
        expected = fake_quantize(weight, scales.weight_amax, "nf4").bfloat16()
        assert torch.equal(module.weight, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_prepared_weights_have_the_codes_of_the_residual(parallel, name):
    model, fmt = quantized_model(parallel, name, "none", torch.bfloat16), FORMATS[name]
    for layer, linear, module in quantizers.decoder_linears(model):
        scales = whole_scales(name, layer, linear, torch.bfloat16)
        residual = residual_weight(
            whole_weight(layer, linear).bfloat16(),
            scales.pre_quant_scale,
            scales.low_rank_a,
            scales.low_rank_b,
        )
        expected = fake_quantize(residual, scales.weight_amax, fmt.weight)
        found = module.weight.float()
        if fmt.modelopt_preset:
            largest = residual.float().abs().max()
            assert (found - residual.float()).abs().max() <= 2.0**-7 * largest
            found = fake_quantize(module.weight, scales.weight_amax, fmt.weight)
        assert torch.equal(found.bfloat16(), expected.bfloat16())


def test_modelopt_presets_are_not_modified(parallel):
    import modelopt.torch.quantization as mtq

    names = {fmt.modelopt_preset for fmt in FORMATS.values()} - {""}
    names |= {"FP8_KV_CFG", "NVFP4_KV_CFG"}
    before = {name: copy.deepcopy(getattr(mtq, name)) for name in names}
    for fmt in FORMATS.values():
        for kv_cache in (None, *KV_CACHES.values()):
            config = quantizers.preset_config(fmt, 32, kv_cache)
            for quantizer in config["quant_cfg"]:
                parts = quantizer.get("cfg") or {}
                for part in parts if isinstance(parts, list) else [parts]:
                    block = part.get("block_sizes", {})
                    assert block.get(-1) in (None, 16 if "scale_bits" in block else 32)
    assert before == {name: getattr(mtq, name) for name in names}
