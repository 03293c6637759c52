"""Codes equal those of modelopt and bitsandbytes, and do not depend on a reader's arithmetic."""

import bitsandbytes.functional as bnb
import pytest
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from nemo_vlm_ptq.formats import MAX_CODE
from nemo_vlm_ptq.numerics import (
    E2M1_MAGNITUDES,
    NF4_VALUES,
    decode,
    dequantize_nf4_absmax,
    encode,
    fake_quantize,
    fake_quantize_nvfp4,
    nudge_off_ties,
    nvfp4_block_scales,
    quantize_nf4_absmax,
    scale_from_amax,
    weight_amax,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def mixed_weight(dtype, std=0.02):
    """Return a weight [64,256] with zero rows, and rows far smaller than the others."""
    torch.manual_seed(0)
    weight = torch.randn(64, 256) * std
    weight[3], weight[4], weight[5, 16:32] = 0.0, -0.0, 0.0
    weight[7] *= 1e-3
    weight[8] *= 1e-5
    return weight.to(dtype)


def pack_nibbles(nibbles):
    """Pack two nibbles per byte, the first one high."""
    flat = nibbles.flatten()
    return (flat[0::2] << 4) | flat[1::2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number_format", ["fp8", "int8", "int4"])
def test_off_ties_codes_do_not_depend_on_how_a_reader_divides(number_format, dtype):
    torch.manual_seed(0)
    nudges = 0
    for amax in torch.linspace(0.08, 0.16, 41).bfloat16().float():
        scale = amax / MAX_CODE[number_format]
        codes = torch.randint(-7, 7, (64, 64)) + 0.5 * torch.randint(0, 2, (64, 64))
        codes = codes * 6 if number_format == "fp8" else codes  # fp8 steps are 2 from 16 to 32
        weight = (codes * scale).to(dtype)
        nudged = nudge_off_ties(weight, amax, number_format)
        expected = encode(weight, amax, number_format).float()
        assert torch.equal(encode(nudged, amax, number_format).float(), expected)
        # The first factor is what torch computes through the reciprocal of amax.
        for factor in (MAX_CODE[number_format] / amax, 1 / scale):
            scaled = nudged.float() * factor
            if number_format == "fp8":
                found = scaled.to(torch.float8_e4m3fn).float()
            else:
                found = scaled.round()
            assert torch.equal(found, expected)
        nudges += int((nudged != weight).sum())
    assert nudges or dtype != torch.float32


def test_a_bfloat16_weight_on_an_fp8_tie_is_moved():
    weight, amax = torch.tensor([[0.016845703125]]).bfloat16(), torch.tensor(0.08984375)
    reciprocal = MAX_CODE["fp8"] * amax.reciprocal()  # how torch divides a number by a tensor
    assert (weight.float() * (amax.new_tensor(448.0) / amax)).item() == 84.0  # between 80 and 88
    assert (weight.float() * reciprocal).item() > 84.0
    nudged = nudge_off_ties(weight, amax, "fp8")
    assert (nudged.float() * reciprocal).to(torch.float8_e4m3fn).float().item() == 80.0


def nvfp4_in_float64(weight, amax):
    """Return block scales and unscaled values in float64; ties go to the even code."""
    global_scale = amax.double() / 2688
    blocks = weight.double().unflatten(1, (-1, 16))
    ratio = (blocks.abs().amax(dim=2) / 6 / global_scale).clamp(2.0**-9, 448)
    scales = ratio.float().to(torch.float8_e4m3fn).double()
    scaled = blocks / (scales * global_scale)[..., None]
    step = torch.where(scaled.abs() < 2, 0.5, torch.where(scaled.abs() < 4, 1.0, 2.0))
    return scales.float(), (scaled / step).round().mul(step).clamp(-6, 6).flatten(1).float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_off_ties_nvfp4_scales_and_codes_do_not_depend_on_how_a_reader_divides(dtype):
    torch.manual_seed(0)
    nudges = 0
    for amax in torch.linspace(0.08, 0.16, 41).bfloat16().float():
        halves = torch.randint(16, 33, (64, 4, 1)) / 2  # of the steps of e4m3 from 8 to 16
        scales = halves * 2.0 ** torch.randint(0, 5, (64, 4, 1))
        codes = torch.randint(-20, 21, (64, 4, 16)) / 4
        codes[..., 0] = 6
        weight = (codes * scales * amax / 2688).flatten(1).to(dtype)
        nudged = nudge_off_ties(weight, amax, "nvfp4")
        expected_scales = nvfp4_block_scales(weight, amax).float()
        expected_codes = encode(weight, amax, "nvfp4")
        assert torch.equal(nvfp4_block_scales(nudged, amax).float(), expected_scales)
        assert torch.equal(encode(nudged, amax, "nvfp4"), expected_codes)
        exact_scales, exact_values = nvfp4_in_float64(nudged, amax)
        assert torch.equal(exact_scales, expected_scales)
        assert torch.equal(exact_values, decode(expected_codes, torch.ones(()), "nvfp4"))
        exported = fake_quantize(nudged, amax, "nvfp4")
        torch.testing.assert_close(
            fake_quantize_nvfp4(nudged.float(), amax), exported, rtol=1e-6, atol=0
        )
        nudges += int((nudged != weight).sum())
        assert (nudged.float() - weight.float()).abs().max() <= 2.0**-7 * amax
    assert nudges


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [1e-4, 0.02, 1.0, 300.0])
@pytest.mark.parametrize("share", [1.0, 0.3, 4.0])  # of the largest, as in fused or clipped weights
def test_nvfp4_equals_modelopt_bit_for_bit(share, std, dtype):
    weight = mixed_weight(dtype, std)
    amax = share * weight.float().abs().amax()
    global_scale = amax / torch.tensor(6.0 * 448.0)
    scales, _ = NVFP4QTensor.get_weights_scaling_factor(weight, 16, global_scale)
    quantized, _, _ = NVFP4QTensor.quantize(weight.clone(), 16, scales, global_scale)
    assert torch.equal(scale_from_amax(amax, "nvfp4"), global_scale)
    found = nvfp4_block_scales(weight, amax)
    assert torch.equal(found.view(torch.uint8), scales.view(torch.uint8))
    codes = encode(weight, amax, "nvfp4")
    assert torch.equal(codes[:, 0::2] | codes[:, 1::2] << 4, quantized._quantized_data)
    values = quantized.dequantize(
        torch.float32, scale=scales, double_scale=global_scale, block_sizes={-1: 16}
    )
    assert torch.equal(fake_quantize(weight, amax, "nvfp4"), values)


def test_nvfp4_codes_are_the_nearest_and_ties_go_to_the_even_code():
    exact = torch.arange(-112, 113) / 16
    weight = torch.cat([exact, exact.new_zeros(15)]).reshape(-1, 16)
    weight[:, -1] = 6  # so that every scale is one
    codes = encode(weight, torch.tensor(6.0 * 448), "nvfp4")
    for value, code in zip(weight.flatten().tolist(), codes.flatten().tolist(), strict=True):
        distances = [abs(abs(value) - magnitude) for magnitude in E2M1_MAGNITUDES]
        nearest = [index for index, d in enumerate(distances) if d == min(distances)]
        assert code & 7 in nearest
        assert len(nearest) == 1 or code % 2 == 0
        assert (code > 7) == (value < 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.3, 1.0, 5.0])
def test_nvfp4_of_activations_equals_that_of_weights_except_for_tiny_scales(share, dtype):
    """modelopt's kernel replaces scales below NVFP4_MIN_SCALE by one."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64)
    amax = share * x.abs().amax()
    x = nudge_off_ties(x.flatten(0, 1).to(dtype), amax, "nvfp4").reshape(x.shape)
    found = fake_quantize_nvfp4(x, amax)
    assert found.dtype == dtype and found.shape == x.shape
    expected = fake_quantize(x.flatten(0, 1), amax, "nvfp4").reshape(x.shape)
    torch.testing.assert_close(found.float(), expected.to(dtype).float(), rtol=2.0**-7, atol=0)
    assert not fake_quantize_nvfp4(x * 1e-6, amax * 1e-6).any()
    assert not fake_quantize_nvfp4(torch.zeros(2, 16), torch.zeros(())).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_equals_bitsandbytes_bit_for_bit(dtype):
    weight = mixed_weight(dtype)
    quantized, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    absmax = weight_amax(weight, "group", 64)
    assert torch.equal(absmax.flatten(), state.absmax)
    assert torch.equal(pack_nibbles(encode(weight, absmax, "nf4")), quantized.flatten())
    decoded = fake_quantize(weight, absmax, "nf4")
    assert torch.equal(decoded.to(dtype), bnb.dequantize_4bit(quantized, state))
    assert torch.equal(
        decode(torch.arange(16).reshape(1, 16), torch.ones(()), "nf4")[0], state.code
    )
    assert state.code.tolist() == pytest.approx(NF4_VALUES)


@pytest.mark.parametrize("blocks", [1, 255, 256, 1000])
def test_nf4_double_quantization_equals_bitsandbytes_bit_for_bit(blocks):
    """bitsandbytes searches for the nearest value in float64 only; in float32 it uses a table."""
    torch.manual_seed(0)
    absmax = torch.rand(blocks) * 0.1 + 0.01
    codes, nested, offset = quantize_nf4_absmax(absmax)
    assert offset == pytest.approx(float(absmax.mean()), rel=1e-6)
    if blocks > 1:
        table, ops = bnb.create_dynamic_map(), torch.ops.bitsandbytes
        found = ops.quantize_blockwise((absmax - offset).double(), table, 256)
        assert torch.equal(codes, found[0]) and torch.equal(nested, found[1])
        decoded = ops.dequantize_blockwise(codes, nested, table, 256, torch.float32) + offset
        assert torch.equal(dequantize_nf4_absmax(codes, nested, offset), decoded)
    error = (dequantize_nf4_absmax(codes, nested, offset) - absmax).abs()
    assert error.max() <= 0.01 * nested.max()


def test_nf4_zeros_stay_zeros_whatever_sign_double_quantization_gives_their_absmax():
    weight = torch.zeros(3, 64)
    amax = torch.tensor([[-1e-4], [0.0], [1e-4]])
    assert encode(weight, amax, "nf4").eq(7).all()
    assert not fake_quantize(weight, amax, "nf4").any()
    ramp = torch.linspace(-1, 1, 64).expand(3, 64) * 1e-4
    decoded = fake_quantize(ramp, amax, "nf4")
    assert not decoded[1].any()
    assert (decoded - ramp)[[0, 2]].abs().max() <= 0.16e-4  # half the widest gap
    assert decoded[0].max() == decoded[2].max() == 1e-4


@pytest.mark.parametrize("number_format", ["fp8", "int8"])
def test_a_per_channel_amax_quantizes_each_row_as_a_tensor(number_format):
    weight = mixed_weight(torch.bfloat16)
    amax = weight_amax(weight, "channel", 0)
    rows = [
        fake_quantize(row[None], row_amax, number_format)
        for row, row_amax in zip(weight, amax, strict=True)
    ]
    assert torch.equal(fake_quantize(weight, amax, number_format), torch.cat(rows))
