"""Rounding to codes and back, in plain torch: the arithmetic that solve and export share.

Legend: O output features, K input features, G = K / group. A scale multiplies a code to give the
value; scale = amax / largest code. All arithmetic is float32.
"""

from __future__ import annotations

import torch

from nemo_vlm_ptq.formats import LARGEST, LOWEST, Granularity, Kind

TIE = 2.0**-20  # relative; some float32 roundings, far less than a step of 16 bit weights


def weight_amax(weight_OK: torch.Tensor, granularity: Granularity, group: int) -> torch.Tensor:
    """Largest magnitude per tensor [], per output channel [O], or per group of inputs [O,G]."""
    magnitude = weight_OK.float().abs()
    if granularity == "tensor":
        return magnitude.amax()
    if granularity == "channel":
        return magnitude.amax(dim=1)
    return magnitude.unflatten(1, (-1, group)).amax(dim=2)


def scale_of(amax: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The scale of an amax; any positive one where nothing but zeros was seen."""
    return _safe(amax) / LARGEST[kind]


def spread(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """A scale [], [O] or [O,G] in a shape that multiplies a weight [O,K]."""
    if scale.dim() == 2:
        return scale.repeat_interleave(columns // scale.shape[1], dim=1)
    return scale[:, None] if scale.dim() == 1 else scale


def encode(weight_OK: torch.Tensor, amax: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Codes [O,K] of a weight: float8_e4m3fn for fp8, int8 for int8 and (unpacked) int4.

    Multiplies by largest / amax, as modelopt's fake quantization does: dividing by the scale would
    round ties to other codes, and bf16 weights hold many ties. (Tensor by tensor, because torch
    divides a Python number by a tensor through the reciprocal.)
    """
    safe = _safe(amax)
    factor = torch.full_like(safe, LARGEST[kind]) / safe
    exact = weight_OK.float() * spread(factor, weight_OK.shape[1])
    if kind == "fp8":
        return exact.clamp(LOWEST[kind], LARGEST[kind]).to(torch.float8_e4m3fn)
    return exact.round().clamp(LOWEST[kind], LARGEST[kind]).to(torch.int8)


def off_ties(weight_OK: torch.Tensor, amax: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The weight, its values half way between two codes moved a little towards the one they get.

    largest / amax and the product are rounded in float32, by some readers in other ways than by
    others (modelopt's own fp8 on a CPU and on a GPU differ); off the ties all find the same codes.
    A move is one step of a 16 bit weight, or 2^-11 of the distance between codes.
    """
    codes = encode(weight_OK, amax, kind)
    low, high = (encode(weight_OK, amax * (1 + shift), kind) for shift in (-TIE, TIE))
    value = decode(codes, scale_of(amax, kind)).to(weight_OK.dtype)
    if weight_OK.dtype == torch.float32:
        moved = torch.lerp(weight_OK, value, 2.0**-10)
    else:
        moved = torch.nextafter(weight_OK, value)
    return torch.where(low.float() == high.float(), weight_OK, moved)


def decode(codes_OK: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Values [O,K] float32 of codes."""
    return codes_OK.float() * spread(scale, codes_OK.shape[1])


def round_trip(weight_OK: torch.Tensor, amax: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The weight as it comes back from its codes, float32."""
    return decode(encode(weight_OK, amax, kind), scale_of(amax, kind))


def _safe(amax: torch.Tensor) -> torch.Tensor:
    """The amax, or one where nothing but zeros was seen."""
    return torch.where(amax > 0, amax.float(), torch.ones_like(amax, dtype=torch.float32))
