"""Number formats as their consumers decode and round them.

Written from the definition of each format and independent of `numerics`, which the writers use.

Legend: O output features, K input features. All functions return float32 unless stated otherwise.
"""

from __future__ import annotations

from typing import Literal

import torch

# Format of a linear's input, of keys or of values: with a static scale per tensor; per token with a
# dynamic scale; in blocks of 16 with dynamic e4m3 scales in units of a static scale.
ActivationFormat = Literal["fp8", "int8", "fp8_token", "nvfp4"]

FP8_MAX, INT8_MIN, INT8_MAX, E2M1_MAX = 448.0, -128.0, 127.0, 6.0
FP8_MIN_NORMAL, FP8_HALF_SUBNORMAL = 2.0**-6, 2.0**-10  # half the distance below the first
NVFP4_BLOCK, NF4_BLOCK = 16, 64  # values that share a scale
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes by code
# Quantiles of the normal distribution (Dettmers et al. 2023, appendix E).
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Unpack bytes [O/2,K] to int4 values [O,K]; the low nibble holds the even row."""
    raw = packed.view(torch.uint8)
    nibbles = torch.stack([raw & 15, raw >> 4], dim=1).flatten(0, 1).float()
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def unpack_int32(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack int32 words [O,K*bits/32] to integers [O,K].

    The lowest bits hold the first column; codes are unsigned with offset 2^(bits-1).
    """
    shifts = torch.arange(0, 32, bits, device=packed.device)
    codes = (packed.long()[..., None] >> shifts) & (2**bits - 1)
    return (codes.flatten(1) - 2 ** (bits - 1)).float()


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Unpack bytes [O,K/2] to e2m1 values [O,K]; the low nibble holds the even column."""
    raw = packed.view(torch.uint8)
    nibbles = torch.stack([raw & 15, raw >> 4], dim=2).flatten(1)
    magnitude = torch.tensor(E2M1_MAGNITUDES, device=raw.device)[(nibbles & 7).int()]
    return torch.where(nibbles > 7, -magnitude, magnitude)


def unpack_nf4(packed: torch.Tensor) -> torch.Tensor:
    """Unpack bytes of any shape to NF4 values [2 * bytes]; the high nibble comes first."""
    raw = packed.view(torch.uint8).flatten()
    nibbles = torch.stack([raw >> 4, raw & 15], dim=1).flatten()
    return torch.tensor(NF4_VALUES, device=raw.device)[nibbles.int()]


def round_to_fp8(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest e4m3 value, saturating."""
    return x.float().clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest e2m1 value, ties to the even code, saturating."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return ((magnitude / step).round() * step).clamp(max=E2M1_MAX) * x.sign()


def nvfp4_underflow(block_scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Return the error that rounding a small block scale may add to the largest value of its block.

    Args:
        block_scale: e4m3 numbers in float32, of any shape.
        global_scale: broadcastable to it.
    """
    added = E2M1_MAX * FP8_HALF_SUBNORMAL * global_scale
    return torch.where(block_scale < FP8_MIN_NORMAL, added, torch.zeros_like(added))


def _fake_quantize_nvfp4(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round blocks of 16 along the last axis, with e4m3 block scales in units of `scale` []."""
    blocks = x.unflatten(-1, (-1, NVFP4_BLOCK))
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    step = round_to_fp8(amax / (E2M1_MAX * scale)) * scale
    values = round_to_e2m1(blocks / step) * step
    return torch.where(step > 0, values, torch.zeros_like(values)).flatten(-2)


def fake_quantize_values(
    x: torch.Tensor, activation_format: ActivationFormat, scale: torch.Tensor | None
) -> torch.Tensor:
    """Quantize and dequantize activations.

    Args:
        x: input of a linear [...,K], or keys or values [...,head_dim].
        activation_format: number format and granularity.
        scale: static scale []; None for `fp8_token`, whose scales are computed from `x`.

    Returns:
        Tensor of the shape and dtype of `x`.
    """
    exact = x.float()
    if activation_format == "fp8_token":
        token_scale = exact.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo().tiny) / FP8_MAX
        return (round_to_fp8(exact / token_scale) * token_scale).to(x.dtype)
    assert scale is not None, activation_format
    if activation_format == "nvfp4":
        return _fake_quantize_nvfp4(exact, scale).to(x.dtype)
    if activation_format == "fp8":
        return (round_to_fp8(exact / scale) * scale).to(x.dtype)
    return ((exact / scale).round().clamp(INT8_MIN, INT8_MAX) * scale).to(x.dtype)
