"""Rounding is that of those who wrote the formats; codes do not depend on a reader's arithmetic."""

import bitsandbytes.functional as bnb
import pytest
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from nemo_vlm_ptq.formats import MAX_CODE
from nemo_vlm_ptq.numerics import (
    E2M1,
    NF4,
    decode,
    dequantize_nf4_absmax,
    encode,
    fake_quantize,
    fake_quantize_nvfp4,
    nudge_off_ties,
    nvfp4_scales,
    quantize_nf4_absmax,
    scale_from_amax,
    weight_amax,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def uneven(dtype, size=0.02):
    """A weight [64,256] with rows of zeros, and rows far smaller than the others."""
    torch.manual_seed(0)
    weight = torch.randn(64, 256) * size
    weight[3], weight[4], weight[5, 16:32] = 0.0, -0.0, 0.0
    weight[7] *= 1e-3
    weight[8] *= 1e-5
    return weight.to(dtype)


def packed(nibbles):
    """Two in a byte, the first one high."""
    flat = nibbles.flatten()
    return (flat[0::2] << 4) | flat[1::2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_weights_off_ties_get_the_same_codes_however_a_reader_divides(kind, dtype):
    torch.manual_seed(0)
    ties = 0
    for amax in torch.linspace(0.08, 0.16, 41).bfloat16().float():
        scale = amax / MAX_CODE[kind]
        codes = torch.randint(-7, 7, (64, 64)) + 0.5 * torch.randint(0, 2, (64, 64))
        codes = codes * 6 if kind == "fp8" else codes  # steps of fp8 are 2 from 16 to 32
        weight = (codes * scale).to(dtype)
        kept = nudge_off_ties(weight, amax, kind)
        wanted = encode(weight, amax, kind).float()
        assert torch.equal(encode(kept, amax, kind).float(), wanted)
        for factor in (MAX_CODE[kind] / amax, 1 / scale):  # a reciprocal, as torch has it; and ours
            exact = kept.float() * factor
            found = exact.to(torch.float8_e4m3fn).float() if kind == "fp8" else exact.round()
            assert torch.equal(found, wanted)
        ties += int((kept != weight).sum())
    assert ties or dtype != torch.float32


def test_a_bfloat16_weight_half_way_between_two_codes_of_fp8_is_moved():
    weight, amax = torch.tensor([[0.016845703125]]).bfloat16(), torch.tensor(0.08984375)
    reciprocal = MAX_CODE["fp8"] * amax.reciprocal()  # as torch divides a number by a tensor
    assert (weight.float() * (amax.new_tensor(448.0) / amax)).item() == 84.0  # between 80 and 88
    assert (weight.float() * reciprocal).item() > 84.0
    kept = nudge_off_ties(weight, amax, "fp8")
    assert (kept.float() * reciprocal).to(torch.float8_e4m3fn).float().item() == 80.0


def nvfp4_in_float64(weight, amax):
    """Scales and values of each block, by exact arithmetic, half way to the even code."""
    second = amax.double() / 2688
    blocks = weight.double().unflatten(1, (-1, 16))
    ratio = (blocks.abs().amax(dim=2) / 6 / second).clamp(2.0**-9, 448)
    scales = ratio.float().to(torch.float8_e4m3fn).double()
    exact = blocks / (scales * second)[..., None]
    step = torch.where(exact.abs() < 2, 0.5, torch.where(exact.abs() < 4, 1.0, 2.0))
    return scales.float(), (exact / step).round().mul(step).clamp(-6, 6).flatten(1).float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_off_ties_get_the_same_nvfp4_however_a_reader_divides(dtype):
    """Both the scales of blocks and the codes in units of them, and so in modelopt's kernel."""
    torch.manual_seed(0)
    moved = 0
    for amax in torch.linspace(0.08, 0.16, 41).bfloat16().float():
        halves = torch.randint(16, 33, (64, 4, 1)) / 2  # of the steps of e4m3 from 8 to 16
        scales = halves * 2.0 ** torch.randint(0, 5, (64, 4, 1))
        codes = torch.randint(-20, 21, (64, 4, 16)) / 4
        codes[..., 0] = 6
        weight = (codes * scales * amax / 2688).flatten(1).to(dtype)
        kept = nudge_off_ties(weight, amax, "nvfp4")
        wanted, whole = nvfp4_scales(weight, amax).float(), encode(weight, amax, "nvfp4")
        assert torch.equal(nvfp4_scales(kept, amax).float(), wanted)
        assert torch.equal(encode(kept, amax, "nvfp4"), whole)
        seen, numbers = nvfp4_in_float64(kept, amax)
        assert torch.equal(seen, wanted)
        assert torch.equal(numbers, decode(whole, torch.ones(()), "nvfp4"))
        exported = fake_quantize(kept, amax, "nvfp4")
        torch.testing.assert_close(
            fake_quantize_nvfp4(kept.float(), amax), exported, rtol=1e-6, atol=0
        )
        moved += int((kept != weight).sum())
        assert (kept.float() - weight.float()).abs().max() <= 2.0**-7 * amax
    assert moved


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-4, 0.02, 1.0, 300.0])
@pytest.mark.parametrize("share", [1.0, 0.3, 4.0])  # of the largest, as in fused or clipped parts
def test_nvfp4_is_modelopts_bit_for_bit(share, size, dtype):
    weight = uneven(dtype, size)
    amax = share * weight.float().abs().amax()
    second = amax / torch.tensor(6.0 * 448.0)
    scales, _ = NVFP4QTensor.get_weights_scaling_factor(weight, 16, second)
    theirs, _, _ = NVFP4QTensor.quantize(weight.clone(), 16, scales, second)
    assert torch.equal(scale_from_amax(amax, "nvfp4"), second)
    assert torch.equal(nvfp4_scales(weight, amax).view(torch.uint8), scales.view(torch.uint8))
    codes = encode(weight, amax, "nvfp4")
    assert torch.equal(codes[:, 0::2] | codes[:, 1::2] << 4, theirs._quantized_data)
    values = theirs.dequantize(
        torch.float32, scale=scales, double_scale=second, block_sizes={-1: 16}
    )
    assert torch.equal(fake_quantize(weight, amax, "nvfp4"), values)


def test_nvfp4_codes_are_the_nearest_and_half_way_the_even_ones():
    exact = torch.arange(-112, 113) / 16
    weight = torch.cat([exact, exact.new_zeros(15)]).reshape(-1, 16)
    weight[:, -1] = 6  # so that every scale is one
    codes = encode(weight, torch.tensor(6.0 * 448), "nvfp4")
    for value, code in zip(weight.flatten().tolist(), codes.flatten().tolist(), strict=True):
        far = [abs(abs(value) - size) for size in E2M1]
        nearest = [place for place, one in enumerate(far) if one == min(far)]
        assert code & 7 in nearest
        assert len(nearest) == 1 or code % 2 == 0
        assert (code > 7) == (value < 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.3, 1.0, 5.0])
def test_nvfp4_of_activations_is_that_of_weights_but_for_scales_that_modelopt_takes_for_one(
    share, dtype
):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64)
    amax = share * x.abs().amax()
    x = nudge_off_ties(x.flatten(0, 1).to(dtype), amax, "nvfp4").reshape(x.shape)
    found = fake_quantize_nvfp4(x, amax)
    assert found.dtype == dtype and found.shape == x.shape
    wanted = fake_quantize(x.flatten(0, 1), amax, "nvfp4").reshape(x.shape)
    torch.testing.assert_close(found.float(), wanted.to(dtype).float(), rtol=2.0**-7, atol=0)
    assert not fake_quantize_nvfp4(x * 1e-6, amax * 1e-6).any()
    assert not fake_quantize_nvfp4(torch.zeros(2, 16), torch.zeros(())).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_is_that_of_bitsandbytes_bit_for_bit(dtype):
    weight = uneven(dtype)
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    absmax = weight_amax(weight, "group", 64)
    assert torch.equal(absmax.flatten(), state.absmax)
    assert torch.equal(packed(encode(weight, absmax, "nf4")), theirs.flatten())
    back = fake_quantize(weight, absmax, "nf4")
    assert torch.equal(back.to(dtype), bnb.dequantize_4bit(theirs, state))
    assert torch.equal(
        decode(torch.arange(16).reshape(1, 16), torch.ones(()), "nf4")[0], state.code
    )
    assert state.code.tolist() == pytest.approx(NF4)


@pytest.mark.parametrize("blocks", [1, 255, 256, 1000])
def test_nf4_double_quantization_is_that_of_bitsandbytes_bit_for_bit(blocks):
    """From float64, where its own code looks for the nearest; in float32 a table decides."""
    torch.manual_seed(0)
    absmax = torch.rand(blocks) * 0.1 + 0.01
    codes, nested, offset = quantize_nf4_absmax(absmax)
    assert offset == pytest.approx(float(absmax.mean()), rel=1e-6)
    if blocks > 1:
        table, ops = bnb.create_dynamic_map(), torch.ops.bitsandbytes
        found = ops.quantize_blockwise((absmax - offset).double(), table, 256)
        assert torch.equal(codes, found[0]) and torch.equal(nested, found[1])
        back = ops.dequantize_blockwise(codes, nested, table, 256, torch.float32) + offset
        assert torch.equal(dequantize_nf4_absmax(codes, nested, offset), back)
    error = (dequantize_nf4_absmax(codes, nested, offset) - absmax).abs()
    assert error.max() <= 0.01 * nested.max()


def test_nf4_gives_zeros_back_whatever_double_quantization_left_of_their_absmax():
    weight = torch.zeros(3, 64)
    amax = torch.tensor([[-1e-4], [0.0], [1e-4]])
    assert encode(weight, amax, "nf4").eq(7).all()
    assert not fake_quantize(weight, amax, "nf4").any()
    some = torch.linspace(-1, 1, 64).expand(3, 64) * 1e-4
    back = fake_quantize(some, amax, "nf4")
    assert not back[1].any()
    assert (back - some)[[0, 2]].abs().max() <= 0.16e-4  # half the widest gap
    assert back[0].max() == back[2].max() == 1e-4


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_an_amax_a_channel_rounds_each_row_as_a_tensor_of_its_own(kind):
    weight = uneven(torch.bfloat16)
    amax = weight_amax(weight, "channel", 0)
    rows = [fake_quantize(row[None], top, kind) for row, top in zip(weight, amax, strict=True)]
    assert torch.equal(fake_quantize(weight, amax, kind), torch.cat(rows))
