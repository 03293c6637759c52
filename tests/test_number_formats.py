"""The reference model's rounding, compared with modelopt and with exhaustive searches."""

import pytest
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from torch.nn.functional import linear
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nemo_vlm_ptq.reference.checkpoint import Dequantized, ReadKvCache, ReadLinear
from nemo_vlm_ptq.reference.kv_cache import FakeQuantizedCache
from nemo_vlm_ptq.reference.model import FakeQuantizedLinear
from nemo_vlm_ptq.reference.number_formats import (
    E2M1_MAGNITUDES,
    fake_quantize_values,
    round_to_e2m1,
)

CPU = torch.device("cpu")


def nearest_e2m1(value):
    """Return the nearest e2m1 value by exhaustive search; ties go to the even code."""
    distances = [
        (abs(abs(value) - magnitude), code % 2, magnitude)
        for code, magnitude in enumerate(E2M1_MAGNITUDES)
    ]
    return min(distances)[2] * (-1 if value < 0 else 1)


def test_e2m1_rounds_to_the_nearest_value_with_ties_to_the_even_code():
    numbers = [step / 16 for step in range(-112, 113)]
    expected = torch.tensor([nearest_e2m1(value) for value in numbers])
    assert torch.equal(round_to_e2m1(torch.tensor(numbers)), expected)


def test_nvfp4_matches_modelopt():
    torch.manual_seed(0)
    x = torch.randn(6, 64) * torch.logspace(-3, 1, 6)[:, None]
    x[2, 16:32] = 0
    scale = x.abs().amax() / (6 * 448)
    codes, block_scales, global_scale = NVFP4QTensor.quantize(x.clone(), 16, None, scale)
    expected = codes.dequantize(
        dtype=torch.float32, scale=block_scales, double_scale=global_scale, block_sizes={-1: 16}
    )
    torch.testing.assert_close(fake_quantize_values(x, "nvfp4", scale), expected, rtol=1e-6, atol=0)


def test_nvfp4_blocks_beyond_the_static_scale_saturate():
    x = torch.full((1, 16), 100.0)
    found = fake_quantize_values(x, "nvfp4", torch.tensor(1 / 448))
    assert torch.equal(found, torch.full((1, 16), 6.0))


def test_fp8_token_uses_one_scale_per_token():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32) * torch.logspace(-2, 2, 3)[:, None]
    found = fake_quantize_values(x, "fp8_token", None)
    for token, rounded in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        assert torch.equal(rounded, fake_quantize_values(token, "fp8", token.abs().amax() / 448))
    zeros = torch.zeros(2, 4)
    assert torch.equal(fake_quantize_values(zeros, "fp8_token", None), zeros)


def test_the_low_rank_branch_takes_the_scaled_input_before_quantization():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 32), torch.randn(8, 32)
    down, up, pre_quant_scale = torch.randn(2, 32), torch.randn(8, 2), torch.rand(32) + 0.5
    scale = torch.tensor(0.1)
    read = ReadLinear(
        {"weight": weight},
        lambda codes: Dequantized(codes["weight"], torch.ones(1)),
        "nvfp4",
        pre_quant_scale=pre_quant_scale,
        low_rank=(down, up),
        input_scale=scale,
        input_format="nvfp4",
    )
    scaled = x * pre_quant_scale
    expected = linear(fake_quantize_values(scaled, "nvfp4", scale), weight) + scaled @ down.T @ up.T
    found = FakeQuantizedLinear(read, torch.float32, CPU)(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def random_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=90,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def kv_cache_scales(number_format):
    return ReadKvCache(
        number_format,
        key_scale=torch.tensor([0.02, 0.03]),
        value_scale=torch.tensor([0.01, 0.04]),
    )


def register_rounding_attention(kv):
    """Register transformers' attention with keys, after rotation, and values fake-quantized."""

    def attention(module, query, key, value, *args, **kwargs):
        key = fake_quantize_values(key, kv.number_format, kv.key_scale[module.layer_idx])
        value = fake_quantize_values(value, kv.number_format, kv.value_scale[module.layer_idx])
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("rounded", attention)
    AttentionMaskInterface.register("rounded", sdpa_mask)


@pytest.mark.parametrize("number_format", ["fp8", "int8", "nvfp4"])
def test_the_kv_cache_quantizes_keys_after_rotation_and_values(number_format):
    kv, ids = kv_cache_scales(number_format), torch.arange(2, 32)[None]
    model = random_llama()
    exact = model(input_ids=ids).logits
    found = model(input_ids=ids, past_key_values=FakeQuantizedCache(model.config, kv)).logits
    register_rounding_attention(kv)
    model.set_attn_implementation("rounded")
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number_format", ["fp8", "int8", "nvfp4"])
def test_generation_token_by_token_equals_the_forward_of_the_whole_sequence(number_format):
    kv, ids = kv_cache_scales(number_format), torch.arange(2, 12)[None]
    model = random_llama()
    tokens = model.generate(
        input_ids=ids,
        past_key_values=FakeQuantizedCache(model.config, kv),
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    cache = FakeQuantizedCache(model.config, kv)
    argmax = model(input_ids=tokens[:, :-1], past_key_values=cache).logits.argmax(-1)
    assert torch.equal(argmax[:, ids.shape[1] - 1 :], tokens[:, ids.shape[1] :])
