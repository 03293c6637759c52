"""Numbers as those who compute with them see them: written from what each format is defined to be,
not from the exporters.

Legend: O output features, K input features. Every function returns float32 unless it says more.
"""

from __future__ import annotations

from typing import Literal

import torch

Rounding = Literal["fp8", "int8", "fp8_token", "nvfp4"]

FP8_TOP, INT8_LOW, INT8_TOP, E2M1_TOP = 448.0, -128.0, 127.0, 6.0
E2M1_BLOCK, NF4_BLOCK = 16, 64
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Quantiles of the normal distribution (Dettmers et al. 2023, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [O/2,K] -> int4 values [O,K]; the low nibble is the even row."""
    raw = packed.view(torch.uint8)
    nibbles = torch.stack([raw & 15, raw >> 4], dim=1).flatten(0, 1).float()
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def unpack_int32(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [O,K*bits/32] -> values [O,K]; the lowest bits come first, zero is the middle code."""
    shifts = torch.arange(0, 32, bits, device=packed.device)
    codes = (packed.long()[..., None] >> shifts) & (2**bits - 1)
    return (codes.flatten(1) - 2 ** (bits - 1)).float()


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [O,K/2] -> e2m1 values [O,K]; the low nibble is the even column."""
    raw = packed.view(torch.uint8)
    nibbles = torch.stack([raw & 15, raw >> 4], dim=2).flatten(1)
    size = torch.tensor(E2M1, device=raw.device)[(nibbles & 7).int()]
    return torch.where(nibbles > 7, -size, size)


def unpack_nf4(packed: torch.Tensor) -> torch.Tensor:
    """Bytes, however many axes -> NF4 values, flat; the high nibble comes first."""
    raw = packed.view(torch.uint8).flatten()
    nibbles = torch.stack([raw >> 4, raw & 15], dim=1).flatten()
    return torch.tensor(NF4, device=raw.device)[nibbles.int()]


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """The nearest e4m3 value; what is too large becomes the largest."""
    return x.float().clamp(-FP8_TOP, FP8_TOP).to(torch.float8_e4m3fn).float()


def to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest e2m1 value, half way to the even code; what is too large becomes the largest."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return ((size / step).round() * step).clamp(max=E2M1_TOP) * x.sign()


def _to_nvfp4(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Blocks of 16 along the last axis, each with an e4m3 scale in units of the static one."""
    blocks = x.unflatten(-1, (-1, E2M1_BLOCK))
    top = blocks.abs().amax(dim=-1, keepdim=True)
    step = to_fp8(top / (E2M1_TOP * scale)) * scale
    values = to_e2m1(blocks / step) * step
    return torch.where(step > 0, values, torch.zeros_like(values)).flatten(-2)


def fake_quantize_values(
    x: torch.Tensor, rounding: Rounding, scale: torch.Tensor | None
) -> torch.Tensor:
    """`x` [...,K] as codes stand for it, in the dtype of `x`.

    Args:
        x: input of a linear, or keys or values with the axis of a head last.
        rounding: how.
        scale: [] static; None where it is made from `x` alone.
    """
    exact = x.float()
    if rounding == "fp8_token":
        own = exact.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo().tiny) / FP8_TOP
        return (to_fp8(exact / own) * own).to(x.dtype)
    assert scale is not None, rounding
    if rounding == "nvfp4":
        return _to_nvfp4(exact, scale).to(x.dtype)
    if rounding == "fp8":
        return (to_fp8(exact / scale) * scale).to(x.dtype)
    return ((exact / scale).round().clamp(INT8_LOW, INT8_TOP) * scale).to(x.dtype)
