"""The runtime rounds as consumers do: compared with modelopt, and with loops over all codes."""

import pytest
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from torch.nn.functional import linear
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nemo_vlm_ptq.reference.checkpoint import Dequantized, ReadKv, ReadLinear
from nemo_vlm_ptq.reference.kv_cache import FakeQuantizedCache
from nemo_vlm_ptq.reference.model import SimulatedLinear
from nemo_vlm_ptq.reference.number_formats import E2M1, fake_quantize_values, to_e2m1

CPU = torch.device("cpu")


def nearest_e2m1(value):
    """The nearest code's value by looking at all; of two, that with the even code."""
    distances = [(abs(abs(value) - size), code % 2, size) for code, size in enumerate(E2M1)]
    return min(distances)[2] * (-1 if value < 0 else 1)


def test_e2m1_is_the_nearest_code_and_the_even_one_half_way():
    numbers = [step / 16 for step in range(-112, 113)]
    expected = torch.tensor([nearest_e2m1(value) for value in numbers])
    assert torch.equal(to_e2m1(torch.tensor(numbers)), expected)


def test_nvfp4_blocks_are_those_of_modelopt():
    torch.manual_seed(0)
    x = torch.randn(6, 64) * torch.logspace(-3, 1, 6)[:, None]
    x[2, 16:32] = 0
    scale = x.abs().amax() / (6 * 448)
    codes, blocks, second = NVFP4QTensor.quantize(x.clone(), 16, None, scale)
    expected = codes.dequantize(
        dtype=torch.float32, scale=blocks, double_scale=second, block_sizes={-1: 16}
    )
    torch.testing.assert_close(fake_quantize_values(x, "nvfp4", scale), expected, rtol=1e-6, atol=0)


def test_nvfp4_blocks_beyond_the_static_scale_saturate():
    x = torch.full((1, 16), 100.0)
    assert torch.equal(
        fake_quantize_values(x, "nvfp4", torch.tensor(1 / 448)), torch.full((1, 16), 6.0)
    )


def test_every_token_has_its_own_fp8_scale():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32) * torch.logspace(-2, 2, 3)[:, None]
    found = fake_quantize_values(x, "fp8_token", None)
    for token, rounded in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        assert torch.equal(rounded, fake_quantize_values(token, "fp8", token.abs().amax() / 448))
    assert torch.equal(
        fake_quantize_values(torch.zeros(2, 4), "fp8_token", None), torch.zeros(2, 4)
    )


def test_the_low_rank_branch_takes_the_input_scaled_but_not_rounded():
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
        rounding="nvfp4",
    )
    scaled = x * pre_quant_scale
    expected = linear(fake_quantize_values(scaled, "nvfp4", scale), weight) + scaled @ down.T @ up.T
    found = SimulatedLinear(read, torch.float32, CPU)(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def llama():
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


def cache_scales(rounding):
    return ReadKv(rounding, torch.tensor([0.02, 0.03]), torch.tensor([0.01, 0.04]))


def round_in_attention(kv):
    """Keys after their rotation, and values, rounded in front of transformers' own attention."""

    def attention(module, query, key, value, *args, **kwargs):
        key = fake_quantize_values(key, kv.rounding, kv.key[module.layer_idx])
        value = fake_quantize_values(value, kv.rounding, kv.value[module.layer_idx])
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("rounded", attention)
    AttentionMaskInterface.register("rounded", sdpa_mask)


@pytest.mark.parametrize("rounding", ["fp8", "int8", "nvfp4"])
def test_attention_sees_keys_after_rotation_and_values_rounded(rounding):
    kv, ids = cache_scales(rounding), torch.arange(2, 32)[None]
    model = llama()
    exact = model(input_ids=ids).logits
    found = model(input_ids=ids, past_key_values=FakeQuantizedCache(model.config, kv)).logits
    round_in_attention(kv)
    model.set_attn_implementation("rounded")
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rounding", ["fp8", "int8", "nvfp4"])
def test_what_is_generated_token_by_token_is_what_whole_sequences_say(rounding):
    kv, ids = cache_scales(rounding), torch.arange(2, 12)[None]
    model = llama()
    tokens = model.generate(
        input_ids=ids,
        past_key_values=FakeQuantizedCache(model.config, kv),
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    cache = FakeQuantizedCache(model.config, kv)
    whole = model(input_ids=tokens[:, :-1], past_key_values=cache).logits.argmax(-1)
    assert torch.equal(whole[:, ids.shape[1] - 1 :], tokens[:, ids.shape[1] :])
