"""Rounding to codes and back, in plain torch: the arithmetic that solve and export share.

Legend: O output features, K input features, G = K / group, n blocks of a flattened tensor. A scale
multiplies a code to give the value; scale = amax / largest code. All arithmetic is float32.

fp8, int8 and int4 codes are numbers. Codes of nvfp4 and nf4 are nibbles in a uint8, unpacked:
nvfp4 has the sign in bit 3 and the ordinal of its magnitude below, nf4 the place in its table.
"""

from __future__ import annotations

import torch

from nemo_vlm_ptq.formats import MAX_CODE, MIN_CODE, NVFP4_BLOCK, Granularity, NumberFormat

TIE_MARGIN = 2.0**-20  # relative; some float32 roundings, far less than a step of 16 bit weights
TIE_NUDGE = 2.0**-10  # of the way to its code that a float32 weight is moved off a tie

E4M3_MAX, E4M3_MIN_SUBNORMAL = 448.0, 2.0**-9
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# A value gets the next magnitude if it is larger than this. Half way goes to the even code, so
# every other bound is the float32 just below half way.
E2M1_BOUNDS = (0.25, 0.75 - 2.0**-24, 1.25, 1.75 - 2.0**-23, 2.5, 3.5 - 2.0**-22, 5.0)
# modelopt's CUDA kernel takes scales of nvfp4 below this for one: such blocks round to zeros.
NVFP4_MIN_SCALE = 1e-5

# Quantiles of the normal distribution (Dettmers et al. 2023), as bitsandbytes has them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
NF4_NESTED_BLOCK = 256  # absmaxes that share a scale of their own


def weight_amax(weight_OK: torch.Tensor, granularity: Granularity, group: int) -> torch.Tensor:
    """Largest magnitude per tensor [], per output channel [O], or per group of inputs [O,G]."""
    magnitude = weight_OK.float().abs()
    if granularity == "tensor":
        return magnitude.amax()
    if granularity == "channel":
        return magnitude.amax(dim=1)
    return magnitude.unflatten(1, (-1, group)).amax(dim=2)


def scale_from_amax(amax: torch.Tensor, kind: NumberFormat) -> torch.Tensor:
    """The scale of an amax; any positive one where nothing but zeros was seen.

    For nvfp4 the second scale [], which its blocks' e4m3 scales are in units of.
    """
    if kind == "nf4":
        return amax.float()  # double quantization may leave a small block with a negative one
    safe = _safe(amax)
    if kind == "nvfp4":
        return safe / torch.full_like(safe, MAX_CODE[kind] * E4M3_MAX)
    return safe / MAX_CODE[kind]


def expand_scale(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """A scale [], [O] or [O,G] in a shape that multiplies a weight [O,K]."""
    if scale.dim() == 2:
        return scale.repeat_interleave(columns // scale.shape[1], dim=1)
    return scale[:, None] if scale.dim() == 1 else scale


def encode(weight_OK: torch.Tensor, amax: torch.Tensor, kind: NumberFormat) -> torch.Tensor:
    """Codes [O,K] of a weight: float8_e4m3fn for fp8, int8 for int8 and int4, uint8 for the rest.

    Multiplies by largest / amax, as modelopt's fake quantization does: dividing by the scale would
    round ties to other codes, and bf16 weights hold many ties. (Tensor by tensor, because torch
    divides a Python number by a tensor through the reciprocal.) nvfp4 divides by the scales, as
    modelopt 0.47's NVFP4QTensor does; nf4 multiplies by the reciprocal, as bitsandbytes 0.50 does.

    Args:
        weight_OK: the weight.
        amax: [], [O] or [O,G]; for nvfp4 [], of the whole tensor; for nf4 [O,G] as it is stored,
            after double quantization.
        kind: kind of number.
    """
    if kind == "nvfp4":
        return _e2m1(
            weight_OK.float() / expand_scale(_nvfp4_steps(weight_OK, amax), weight_OK.shape[1])
        )
    if kind == "nf4":
        return _nf4(weight_OK, amax)
    safe = _safe(amax)
    factor = torch.full_like(safe, MAX_CODE[kind]) / safe
    exact = weight_OK.float() * expand_scale(factor, weight_OK.shape[1])
    if kind == "fp8":
        return exact.clamp(MIN_CODE[kind], MAX_CODE[kind]).to(torch.float8_e4m3fn)
    return exact.round().clamp(MIN_CODE[kind], MAX_CODE[kind]).to(torch.int8)


def decode(codes_OK: torch.Tensor, scale: torch.Tensor, kind: NumberFormat) -> torch.Tensor:
    """Values [O,K] float32 of codes; `scale` multiplies them: [], [O] or [O,G].

    For nvfp4 [O,K/16]: the e4m3 scales as float32 times the second one.
    """
    if kind == "nvfp4":
        values = codes_OK.new_tensor(E2M1 + tuple(-x for x in E2M1), dtype=torch.float32)
        numbers = values[codes_OK.int()]
    elif kind == "nf4":
        numbers = codes_OK.new_tensor(NF4, dtype=torch.float32)[codes_OK.int()]
    else:
        numbers = codes_OK.float()
    return numbers * expand_scale(scale, codes_OK.shape[1])


def fake_quantize(weight_OK: torch.Tensor, amax: torch.Tensor, kind: NumberFormat) -> torch.Tensor:
    """The weight as it comes back from its codes, float32."""
    scale = _nvfp4_steps(weight_OK, amax) if kind == "nvfp4" else scale_from_amax(amax, kind)
    return decode(encode(weight_OK, amax, kind), scale, kind)


def nvfp4_scales(weight_OK: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Scales [O,K/16] float8_e4m3fn of blocks of 16, in units of the second scale of `amax` [].

    One where a block holds zeros alone (before it is clamped to what e4m3 can hold).
    """
    top = weight_OK.float().unflatten(1, (-1, NVFP4_BLOCK)).abs().amax(dim=2)
    exact = top / (MAX_CODE["nvfp4"] * scale_from_amax(amax, "nvfp4"))
    exact = torch.where(exact == 0, torch.ones_like(exact), exact)
    return exact.clamp(E4M3_MIN_SUBNORMAL, E4M3_MAX).to(torch.float8_e4m3fn)


def fake_quantize_nvfp4(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """nvfp4 there and back as modelopt 0.47's CUDA kernel fake-quantizes, in the dtype of `x`.

    Args:
        x: [...,K], K a multiple of 16; every 16 neighbours share a scale made from them.
        amax: [] static, largest magnitude of all; larger blocks saturate.
    """
    # Its quotients are products with the reciprocal, up to two units in the last place.
    second = amax.float() * (1.0 / (MAX_CODE["nvfp4"] * E4M3_MAX))
    second = torch.where(second > 0, second, torch.full_like(second, 1e-12))
    blocks = x.float().unflatten(-1, (-1, NVFP4_BLOCK))
    exact = blocks.abs().amax(dim=-1, keepdim=True) * (1.0 / (MAX_CODE["nvfp4"] * second))
    scale = exact.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float() * second
    scale = torch.where(scale >= NVFP4_MIN_SCALE, scale, torch.ones_like(scale))
    codes = _e2m1(blocks.abs() * (1.0 / scale))
    values = x.new_tensor(E2M1, dtype=torch.float32)[codes.int()] * scale
    signed = torch.where(blocks >= 0, values, 0.0 - values)  # the kernel knows no minus zero
    return signed.flatten(-2).to(x.dtype)


def quantize_nf4_absmax(absmax_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What bitsandbytes' `compress_statistics` stores of the absmaxes of one tensor's blocks.

    Args:
        absmax_n: float32, blocks of 64 in the order of the flattened Hugging Face tensor.

    Returns:
        codes uint8 [n] in its 256 dynamic values, their scales float32 [ceil(n/256)], and the
        offset float32 []: the mean, summed in float64 so that it is the same on every machine.
    """
    offset = absmax_n.double().mean().float()
    centred = absmax_n.float() - offset
    nested = torch.stack([part.abs().amax() for part in centred.split(NF4_NESTED_BLOCK)])
    table = _dynamic_map().to(absmax_n.device)
    exact = centred * _each(1.0 / nested.clamp(min=1e-38), len(centred))
    bounds = (table[:-1] + table[1:]) / 2
    return torch.bucketize(exact, bounds).to(torch.uint8), nested, offset


def dequantize_nf4_absmax(
    codes_n: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """Absmaxes [n] float32 as bitsandbytes reads back what `nf4_double` gave."""
    return _dynamic_map().to(codes_n.device)[codes_n.int()] * _each(nested, len(codes_n)) + offset


def nudge_off_ties(weight_OK: torch.Tensor, amax: torch.Tensor, kind: NumberFormat) -> torch.Tensor:
    """The weight, its values half way between two codes moved a little towards the one they get.

    largest / amax and the product are rounded in float32, by some readers in other ways than by
    others (modelopt's own fp8 on a CPU and on a GPU differ); off the ties all find the same codes.
    A move is one step of a 16 bit weight, or 2^-11 of the distance between codes. In nvfp4 scales
    of blocks have ties of their own: the largest of the block is moved, which moves no other
    weight over a tie, as scales stay what they were. nf4 is left alone: its amax has another sign
    or size than the weight, and nobody but its packer looks for codes.
    """
    if kind == "nf4":
        return weight_OK
    amax = amax.float()
    if kind == "nvfp4":
        weight_OK = _off_scale_ties(weight_OK, amax)
        scale = expand_scale(_nvfp4_steps(weight_OK, amax), weight_OK.shape[1])
        exact = weight_OK.float() / scale
        codes = _e2m1(exact)
        low, high = (_e2m1(exact * (1 + shift)) for shift in (-TIE_MARGIN, TIE_MARGIN))
        value = decode(codes, scale, kind)
    else:
        codes = encode(weight_OK, amax, kind)
        low, high = (
            encode(weight_OK, amax * (1 + shift), kind) for shift in (-TIE_MARGIN, TIE_MARGIN)
        )
        value = decode(codes, scale_from_amax(amax, kind), kind)
    return torch.where(low.float() == high.float(), weight_OK, _nearer(weight_OK, value))


def _off_scale_ties(weight_OK: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """The weight with the largest of each block moved if the block's nvfp4 scale is half way."""
    blocks = weight_OK.unflatten(1, (-1, NVFP4_BLOCK))
    top = blocks.abs().amax(dim=2, keepdim=True)
    low, high = (
        nvfp4_scales(weight_OK, amax * (1 + shift)).float() for shift in (-TIE_MARGIN, TIE_MARGIN)
    )
    whole = MAX_CODE["nvfp4"] * _nvfp4_steps(weight_OK, amax)[..., None]  # largest that it holds
    moved = torch.where(blocks >= 0, _nearer(top, whole), -_nearer(top, whole))
    touched = (low != high)[..., None] & (blocks.abs() == top)
    return torch.where(touched, moved, blocks).flatten(1)


def _nearer(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The weight, moved a little towards a value."""
    if weight.dtype == torch.float32:
        return torch.lerp(weight, value, TIE_NUDGE)
    return torch.nextafter(weight, value.to(weight.dtype))


def _nvfp4_steps(weight_OK: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Scales [O,K/16] float32 that multiply nvfp4 codes."""
    return nvfp4_scales(weight_OK, amax).float() * scale_from_amax(amax, "nvfp4")


def _e2m1(exact: torch.Tensor) -> torch.Tensor:
    """Nearest e2m1 codes, half way to the even one."""
    bounds = exact.new_tensor(E2M1_BOUNDS, dtype=torch.float32)
    ordinal = torch.bucketize(exact.abs(), bounds, out_int32=True)
    return (ordinal + 8 * (exact < 0)).to(torch.uint8)


def _nf4(weight_OK: torch.Tensor, amax_OG: torch.Tensor) -> torch.Tensor:
    factor = torch.where(amax_OG == 0, torch.zeros_like(amax_OG), 1.0 / amax_OG)
    table = amax_OG.new_tensor(NF4, dtype=torch.float32)
    exact = weight_OK.float() * expand_scale(factor, weight_OK.shape[1])
    return torch.bucketize(exact, (table[:-1] + table[1:]) / 2).to(torch.uint8)


def _dynamic_map() -> torch.Tensor:
    """The 256 values of bitsandbytes' signed dynamic numbers [256] (Dettmers 2015)."""
    values = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32)
        means = 10 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def _each(per_block: torch.Tensor, length: int) -> torch.Tensor:
    """One value an absmax from one a nested block."""
    return per_block.repeat_interleave(NF4_NESTED_BLOCK)[:length]


def _safe(amax: torch.Tensor) -> torch.Tensor:
    """The amax, or one where nothing but zeros was seen."""
    return torch.where(amax > 0, amax.float(), torch.ones_like(amax, dtype=torch.float32))
