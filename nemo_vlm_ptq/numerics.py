"""Encoding of weights to codes and decoding, in plain torch; solve and export share it.

All arithmetic is float32, and reproduces the rounding of the libraries that read the exports:
modelopt 0.47, bitsandbytes 0.50 and modelopt's CUDA kernel of nvfp4.

Axes: O output features, K input features, G = K / group, n blocks of a flattened tensor, m nested
blocks. A scale multiplies a code to give the value; scale = amax / largest code.

Codes of fp8, int8 and int4 are numbers. Codes of nvfp4 and nf4 are unpacked nibbles in uint8: for
nvfp4 bit 3 is the sign and the lower bits index E2M1_MAGNITUDES, for nf4 they index NF4_VALUES.
"""

from __future__ import annotations

import torch

from nemo_vlm_ptq.formats import (
    MAX_CODE,
    MIN_AMAX,
    MIN_CODE,
    NVFP4_BLOCK,
    Granularity,
    NumberFormat,
)

TIE_MARGIN = 2.0**-20  # relative; some float32 roundings, far below the spacing of 16-bit weights
TIE_NUDGE = 2.0**-10  # fraction of the distance to its code that a float32 weight moves off a tie

E4M3_MAX, E4M3_MIN_SUBNORMAL = 448.0, 2.0**-9
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# A value above bound i gets a magnitude above i. Ties go to the even code, so that every other
# bound is the largest float32 below the midpoint.
E2M1_BOUNDS = (0.25, 0.75 - 2.0**-24, 1.25, 1.75 - 2.0**-23, 2.5, 3.5 - 2.0**-22, 5.0)
# modelopt's CUDA kernel replaces nvfp4 scales below this by one: such blocks round to zeros.
NVFP4_MIN_SCALE = 1e-5
NVFP4_MIN_GLOBAL_SCALE = 1e-12  # in place of zero, as in modelopt's CUDA kernel

# Quantiles of the normal distribution (Dettmers et al. 2023), as in bitsandbytes.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
NF4_NESTED_BLOCK = 256  # absmax values that share a nested scale
NF4_MIN_NESTED_SCALE = 1e-38


def weight_amax(weight_OK: torch.Tensor, granularity: Granularity, group: int) -> torch.Tensor:
    """Return the amax per tensor [], per output channel [O], or per group of inputs [O,G]."""
    magnitude_OK = weight_OK.float().abs()
    if granularity == "tensor":
        return magnitude_OK.amax()
    if granularity == "channel":
        return magnitude_OK.amax(dim=1)
    return magnitude_OK.unflatten(1, (-1, group)).amax(dim=2)


def scale_from_amax(amax: torch.Tensor, number_format: NumberFormat) -> torch.Tensor:
    """Return the scale of an amax; an amax up to MIN_AMAX counts as one.

    For nvfp4 return the global scale [], which multiplies the e4m3 scales of the blocks.
    """
    if number_format == "nf4":
        return amax.float()  # double quantization can make the amax of a small block negative
    positive = _positive_amax(amax)
    if number_format == "nvfp4":
        return positive / torch.full_like(positive, MAX_CODE[number_format] * E4M3_MAX)
    return positive / MAX_CODE[number_format]


def expand_scale(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """Expand a scale [], [O] or [O,G] to a shape that broadcasts with a weight of K columns."""
    if scale.dim() == 2:
        return scale.repeat_interleave(columns // scale.shape[1], dim=1)
    return scale[:, None] if scale.dim() == 1 else scale


def encode(
    weight_OK: torch.Tensor, amax: torch.Tensor, number_format: NumberFormat
) -> torch.Tensor:
    """Encode a weight to codes [O,K]: float8_e4m3fn for fp8, int8 for int8 and int4, else uint8.

    Multiply by (largest code / amax), as modelopt does: dividing by the scale would round ties to
    other codes. The quotient is computed between tensors, because torch divides a Python number by
    a tensor through the reciprocal. nvfp4 divides by the scales, as modelopt 0.47's NVFP4QTensor
    does; nf4 multiplies by the reciprocal, as bitsandbytes 0.50 does.

    Args:
        weight_OK: the weight.
        amax: [], [O] or [O,G]; for nvfp4 [], of the whole tensor; for nf4 [O,G] as stored, after
            double quantization.
        number_format: number format of the codes.
    """
    columns = weight_OK.shape[1]
    if number_format == "nvfp4":
        return _encode_e2m1(
            weight_OK.float() / expand_scale(_nvfp4_scales(weight_OK, amax), columns)
        )
    if number_format == "nf4":
        return _encode_nf4(weight_OK, amax)
    positive = _positive_amax(amax)
    factor = torch.full_like(positive, MAX_CODE[number_format]) / positive
    scaled_OK = weight_OK.float() * expand_scale(factor, columns)
    low, high = MIN_CODE[number_format], MAX_CODE[number_format]
    if number_format == "fp8":
        return scaled_OK.clamp(low, high).to(torch.float8_e4m3fn)
    return scaled_OK.round().clamp(low, high).to(torch.int8)


def decode(
    codes_OK: torch.Tensor, scale: torch.Tensor, number_format: NumberFormat
) -> torch.Tensor:
    """Decode codes to values [O,K] float32.

    Args:
        codes_OK: the codes, of this number format.
        scale: [], [O] or [O,G]; for nvfp4 [O,K/16], the block scales times the global scale.
        number_format: of the codes.
    """
    if number_format == "nvfp4":
        magnitudes = E2M1_MAGNITUDES
        table = codes_OK.new_tensor(magnitudes + tuple(-x for x in magnitudes), dtype=torch.float32)
        numbers_OK = table[codes_OK.int()]
    elif number_format == "nf4":
        numbers_OK = codes_OK.new_tensor(NF4_VALUES, dtype=torch.float32)[codes_OK.int()]
    else:
        numbers_OK = codes_OK.float()
    return numbers_OK * expand_scale(scale, codes_OK.shape[1])


def fake_quantize(
    weight_OK: torch.Tensor, amax: torch.Tensor, number_format: NumberFormat
) -> torch.Tensor:
    """Encode a weight and decode it to float32."""
    if number_format == "nvfp4":
        scale = _nvfp4_scales(weight_OK, amax)
    else:
        scale = scale_from_amax(amax, number_format)
    return decode(encode(weight_OK, amax, number_format), scale, number_format)


def nvfp4_block_scales(weight_OK: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Return the scales [O,K/16] float8_e4m3fn of blocks of 16, in units of the global scale.

    The scale of a block of zeros is one before it is clamped to the range of e4m3.

    Args:
        weight_OK: the weight.
        amax: [], of the global scale.
    """
    block_amax = weight_OK.float().unflatten(1, (-1, NVFP4_BLOCK)).abs().amax(dim=2)
    scales = block_amax / (MAX_CODE["nvfp4"] * scale_from_amax(amax, "nvfp4"))
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return scales.clamp(E4M3_MIN_SUBNORMAL, E4M3_MAX).to(torch.float8_e4m3fn)


def fake_quantize_nvfp4(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Fake-quantize to nvfp4 as modelopt 0.47's CUDA kernel does, in the dtype of `x`.

    Args:
        x: [...,K], K a multiple of 16; 16 neighbours form a block and share a dynamic scale.
        amax: [], static, of the whole tensor; blocks with a larger amax saturate.
    """
    # The kernel multiplies by reciprocals, so that quotients differ by up to two ulp.
    global_scale = amax.float() * (1.0 / (MAX_CODE["nvfp4"] * E4M3_MAX))
    minimum = torch.full_like(global_scale, NVFP4_MIN_GLOBAL_SCALE)
    global_scale = torch.where(global_scale > 0, global_scale, minimum)
    blocks = x.float().unflatten(-1, (-1, NVFP4_BLOCK))
    block_amax = blocks.abs().amax(dim=-1, keepdim=True)
    block_scale = block_amax * (1.0 / (MAX_CODE["nvfp4"] * global_scale))
    scale = block_scale.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float() * global_scale
    scale = torch.where(scale >= NVFP4_MIN_SCALE, scale, torch.ones_like(scale))
    codes = _encode_e2m1(blocks.abs() * (1.0 / scale))
    magnitudes = x.new_tensor(E2M1_MAGNITUDES, dtype=torch.float32)[codes.int()] * scale
    values = torch.where(blocks >= 0, magnitudes, 0.0 - magnitudes)  # never minus zero
    return values.flatten(-2).to(x.dtype)


def quantize_nf4_absmax(absmax_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize the absmax of nf4 blocks, as bitsandbytes does with `compress_statistics`.

    Args:
        absmax_n: float32, blocks of 64 in the order of the flattened Hugging Face tensor.

    Returns:
        codes uint8 [n], indices into bitsandbytes' 256 dynamic values; their nested scales float32
        [ceil(n/256)]; the offset float32 [], the mean, summed in float64 for equal bits anywhere.
    """
    offset = absmax_n.double().mean().float()
    centred_n = absmax_n.float() - offset
    nested_m = torch.stack([part.abs().amax() for part in centred_n.split(NF4_NESTED_BLOCK)])
    table = _dynamic_values().to(absmax_n.device)
    reciprocal_m = 1.0 / nested_m.clamp(min=NF4_MIN_NESTED_SCALE)
    scaled_n = centred_n * _expand_nested(reciprocal_m, len(centred_n))
    bounds = (table[:-1] + table[1:]) / 2
    return torch.bucketize(scaled_n, bounds).to(torch.uint8), nested_m, offset


def dequantize_nf4_absmax(
    codes_n: torch.Tensor, nested_m: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """Return the absmax [n] float32 that bitsandbytes decodes from `quantize_nf4_absmax`."""
    values_n = _dynamic_values().to(codes_n.device)[codes_n.int()]
    return values_n * _expand_nested(nested_m, len(codes_n)) + offset


def nudge_off_ties(
    weight_OK: torch.Tensor, amax: torch.Tensor, number_format: NumberFormat
) -> torch.Tensor:
    """Return the weight with values near a tie between two codes nudged towards their code.

    (largest code / amax) and its product with the weight are rounded in float32, in different ways
    by different readers: modelopt's own fp8 differs between CPU and GPU. Off the ties all readers
    find the same codes. A value moves by one step of a 16-bit dtype, or by 2^-11 of the distance
    between codes. The block scales of nvfp4 have ties too: there the amax element of the block is
    nudged, which puts no other weight over a tie, because the scales keep their values. nf4 is
    unchanged: the sign or size of its stored amax differs from the weight's, and only its packer
    computes codes.
    """
    if number_format == "nf4":
        return weight_OK
    amax = amax.float()
    if number_format == "nvfp4":
        weight_OK = _nudge_block_amax(weight_OK, amax)
        scale = expand_scale(_nvfp4_scales(weight_OK, amax), weight_OK.shape[1])
        scaled_OK = weight_OK.float() / scale
        codes_OK = _encode_e2m1(scaled_OK)
        low, high = (_encode_e2m1(scaled_OK * (1 + shift)) for shift in (-TIE_MARGIN, TIE_MARGIN))
        value_OK = decode(codes_OK, scale, number_format)
    else:
        codes_OK = encode(weight_OK, amax, number_format)
        low, high = (
            encode(weight_OK, amax * (1 + shift), number_format)
            for shift in (-TIE_MARGIN, TIE_MARGIN)
        )
        value_OK = decode(codes_OK, scale_from_amax(amax, number_format), number_format)
    return torch.where(low.float() == high.float(), weight_OK, _nudge(weight_OK, value_OK))


def _nudge_block_amax(weight_OK: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Return the weight with the amax elements nudged of blocks whose nvfp4 scale is near a tie."""
    blocks = weight_OK.unflatten(1, (-1, NVFP4_BLOCK))
    block_amax = blocks.abs().amax(dim=2, keepdim=True)
    low, high = (
        nvfp4_block_scales(weight_OK, amax * (1 + shift)).float()
        for shift in (-TIE_MARGIN, TIE_MARGIN)
    )
    largest_value = MAX_CODE["nvfp4"] * _nvfp4_scales(weight_OK, amax)[..., None]
    nudged = _nudge(block_amax, largest_value)
    nudged = torch.where(blocks >= 0, nudged, -nudged)
    at_tie = (low != high)[..., None] & (blocks.abs() == block_amax)
    return torch.where(at_tie, nudged, blocks).flatten(1)


def _nudge(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return the weight nudged towards a value, by one step of its dtype if that is 16 bit."""
    if weight.dtype == torch.float32:
        return torch.lerp(weight, value, TIE_NUDGE)
    return torch.nextafter(weight, value.to(weight.dtype))


def _nvfp4_scales(weight_OK: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Return the scales [O,K/16] float32 that multiply nvfp4 codes: block scale * global scale."""
    return nvfp4_block_scales(weight_OK, amax).float() * scale_from_amax(amax, "nvfp4")


def _encode_e2m1(scaled: torch.Tensor) -> torch.Tensor:
    """Return the nearest e2m1 codes; ties go to the even code."""
    bounds = scaled.new_tensor(E2M1_BOUNDS, dtype=torch.float32)
    index = torch.bucketize(scaled.abs(), bounds, out_int32=True)
    return (index + 8 * (scaled < 0)).to(torch.uint8)


def _encode_nf4(weight_OK: torch.Tensor, amax_OG: torch.Tensor) -> torch.Tensor:
    """Return the nearest nf4 codes; the reciprocal of an amax of zero counts as zero."""
    factor_OG = torch.where(amax_OG == 0, torch.zeros_like(amax_OG), 1.0 / amax_OG)
    table = amax_OG.new_tensor(NF4_VALUES, dtype=torch.float32)
    scaled_OK = weight_OK.float() * expand_scale(factor_OG, weight_OK.shape[1])
    return torch.bucketize(scaled_OK, (table[:-1] + table[1:]) / 2).to(torch.uint8)


def _dynamic_values() -> torch.Tensor:
    """Return the values [256] of bitsandbytes' signed dynamic format (Dettmers 2015)."""
    values = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32)
        means = 10 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def _expand_nested(nested_m: torch.Tensor, length: int) -> torch.Tensor:
    """Repeat one value per nested block to one value per block."""
    return nested_m.repeat_interleave(NF4_NESTED_BLOCK)[:length]


def _positive_amax(amax: torch.Tensor) -> torch.Tensor:
    """Return the amax as float32, with ones in place of those up to MIN_AMAX."""
    return torch.where(amax > MIN_AMAX, amax.float(), torch.ones_like(amax, dtype=torch.float32))
