"""Fused kernels of the search for scales on NVIDIA GPUs (Triton).

As in `calibrate.sum_kernels`, the eager code next to every call defines the result.

Legend: K input features, N rows of a weight, G groups of inputs, C candidate scales, M rows of a
result (N for each candidate).
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nemo_vlm_ptq.formats import MAX_CODE, MIN_AMAX, MIN_CODE, NumberFormat

NO_FMA: dict[str, Any] = {"enable_fp_fusion": False}  # round products as eager PyTorch does
ROUND_32 = tl.constexpr(1.5 * 2.0**23)  # adding and subtracting it rounds float32, halves to even
LEAST_AMAX = tl.constexpr(MIN_AMAX)


def clip_candidates(
    weight_NK: torch.Tensor,
    pre_quant_scale_CK: torch.Tensor,
    blocks_Bbb: torch.Tensor,
    ratios: torch.Tensor,
    number_format: NumberFormat,
    group_size: int,
) -> torch.Tensor:
    """Return each group's plain amax and the clipped amax of least cost, float32 [C,2,N,G].

    The result is that of `clipping.clip_amax` for each candidate.

    Args:
        weight_NK: in the model's dtype.
        pre_quant_scale_CK: float32, one candidate per row.
        blocks_Bbb: float32, diagonal blocks of the mean of x x^T; a group lies within a block.
        ratios: float32, of the largest magnitude; the first of equal costs is chosen.
        number_format: int4 or another integer format.
        group_size: inputs that share a weight scale.
    """
    (height, width), count = weight_NK.shape, len(pre_quant_scale_CK)
    shape = (count, 2, height, width // group_size)
    out = torch.empty(shape, dtype=torch.float32, device=weight_NK.device)
    grid = (triton.cdiv(height, 64), width // group_size, count)
    _clip_candidates_kernel[grid](
        weight_NK, 1.0 / pre_quant_scale_CK, pre_quant_scale_CK, blocks_Bbb, ratios, out,
        height, width, weight_NK.stride(0), len(ratios), blocks_Bbb.shape[1],
        MIN_CODE[number_format], MAX_CODE[number_format], group_size, 64,
        num_warps=4, num_stages=1, **NO_FMA,
    )  # fmt: skip
    return out


def weight_delta(
    weight_NK: torch.Tensor,
    pre_quant_scale_CK: torch.Tensor | None,
    amax: torch.Tensor,
    number_format: NumberFormat,
    amax_2: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the dequantized weight minus the weight, [M,K].

    M is N, or a multiple of it: then the weight repeats, and each of the C candidates of the
    pre_quant_scale and of amax_2 has M / C consecutive rows.

    Args:
        weight_NK: in the model's dtype.
        pre_quant_scale_CK: float32, or None.
        amax: float32, [], [N] or [M,G].
        number_format: fp8 or an integer format.
        amax_2: float32 [C], of a second rounding to fp8, or None.
        dtype: of the result.
    """
    height, width = weight_NK.shape
    amax_row_stride, amax_group_stride, group_size, rows = 0, 0, width, height
    if amax.dim():
        amax_row_stride, rows = amax.stride(0), len(amax)
    if amax.dim() == 2:
        amax_group_stride, group_size = 1, width // amax.shape[1]
    out = torch.empty(rows, width, dtype=dtype, device=weight_NK.device)
    scaled, requantized = pre_quant_scale_CK is not None, amax_2 is not None
    rows_per_candidate, inverse_scale_CK = rows, weight_NK  # the latter is not read if not scaled
    if pre_quant_scale_CK is not None:
        rows_per_candidate = rows // len(pre_quant_scale_CK)
        inverse_scale_CK = 1.0 / pre_quant_scale_CK
    grid = (triton.cdiv(rows, 8), triton.cdiv(width, 256))
    _weight_delta_kernel[grid](
        weight_NK, inverse_scale_CK, pre_quant_scale_CK, amax, amax_2, out,
        rows, height, rows_per_candidate, width,
        weight_NK.stride(0), amax_row_stride, amax_group_stride, group_size,
        MIN_CODE[number_format], MAX_CODE[number_format], MAX_CODE["fp8"],
        number_format == "fp8", scaled, requantized, 8, 256, **NO_FMA,
    )  # fmt: skip
    return out


@triton.jit
def _clip_candidates_kernel(
    weight_ptr, inverse_scale_ptr, scale_ptr, blocks_ptr, ratios_ptr, out_ptr,
    height, width, weight_stride, num_ratios, block_features,
    MIN: tl.constexpr, MAX: tl.constexpr, GROUP_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * GROUP_SIZE + tl.arange(0, GROUP_SIZE)
    mask = rows < height
    pointers = weight_ptr + rows.to(tl.int64)[:, None] * weight_stride + columns[None, :]
    weight = tl.load(pointers, mask=mask[:, None], other=0.0)
    offsets = tl.program_id(2) * width + columns
    inverse_scale = tl.load(inverse_scale_ptr + offsets)[None, :]
    smooth = (weight.to(tl.float32) * inverse_scale).to(weight.dtype).to(tl.float32)
    scale = tl.load(scale_ptr + offsets)[None, :]
    within = columns % block_features
    pointers = blocks_ptr + columns.to(tl.int64)[:, None] * block_features + within[None, :]
    second_moment = tl.load(pointers)
    plain_amax = tl.max(tl.abs(smooth), 1)
    least_cost = tl.full((ROWS,), float("inf"), tl.float32)
    best_amax = plain_amax
    for step in range(num_ratios):
        amax = (plain_amax * tl.load(ratios_ptr + step)).to(weight.dtype).to(tl.float32)
        safe = tl.where(amax > LEAST_AMAX, amax, 1.0)
        factor = tl.div_rn(tl.zeros_like(safe) + MAX, safe)
        codes = ((smooth * factor[:, None]) + ROUND_32) - ROUND_32
        codes = tl.minimum(tl.maximum(codes, MIN), MAX)
        delta = (codes * tl.div_rn(safe, tl.zeros_like(safe) + MAX)[:, None] - smooth) * scale
        cost = tl.sum(tl.dot(delta, second_moment) * delta, 1)
        better = cost < least_cost
        least_cost = tl.where(better, cost, least_cost)
        best_amax = tl.where(better, amax, best_amax)
    groups = width // GROUP_SIZE
    pointers = out_ptr + (2 * tl.program_id(2) * height + rows).to(tl.int64) * groups
    pointers += tl.program_id(1)
    tl.store(pointers, plain_amax, mask=mask)
    tl.store(pointers + height * groups, best_amax, mask=mask)


@triton.jit
def _round_to_e4m3(value):
    """Round to the nearest e4m3 number, halves to even; the value must be within its range.

    Triton's own cast needs compute capability 8.9.
    """
    power = (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.maximum(power, 0.015625) * 0.125
    return (tl.div_rn(value, step) + ROUND_32 - ROUND_32) * step


@triton.jit
def _fake_quantize(value, amax, MIN, MAX, FP8: tl.constexpr):
    """Quantize and dequantize."""
    safe = tl.where(amax > LEAST_AMAX, amax, 1.0)
    code = value * tl.div_rn(tl.zeros_like(safe) + MAX, safe)
    if FP8:
        code = _round_to_e4m3(tl.minimum(tl.maximum(code, MIN), MAX))
    else:
        code = tl.minimum(tl.maximum((code + ROUND_32) - ROUND_32, MIN), MAX)
    return code * tl.div_rn(safe, tl.zeros_like(safe) + MAX)


@triton.jit
def _weight_delta_kernel(
    weight_ptr, inverse_scale_ptr, scale_ptr, amax_ptr, amax_2_ptr, out_ptr,
    out_rows, height, rows_per_candidate, width,
    weight_stride, amax_row_stride, amax_group_stride, group_size,
    MIN: tl.constexpr, MAX: tl.constexpr, FP8_MAX: tl.constexpr, FP8: tl.constexpr,
    SCALED: tl.constexpr, REQUANTIZED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (rows < out_rows) & (columns < width)
    weight = tl.load(weight_ptr + (rows % height) * weight_stride + columns, mask=mask, other=0.0)
    value = weight.to(tl.float32)
    offsets = (rows // rows_per_candidate) * width + columns
    if SCALED:
        inverse_scale = tl.load(inverse_scale_ptr + offsets, mask=mask, other=1.0)
        value = (value * inverse_scale).to(weight.dtype).to(tl.float32)
    pointers = amax_ptr + rows * amax_row_stride + (columns // group_size) * amax_group_stride
    value = _fake_quantize(value, tl.load(pointers, mask=mask, other=1.0), MIN, MAX, FP8)
    if REQUANTIZED:
        pointers = amax_2_ptr + rows // rows_per_candidate
        amax_2 = tl.load(pointers, mask=rows < out_rows, other=1.0)
        value = _fake_quantize(value, amax_2, -FP8_MAX, FP8_MAX, True)
    if SCALED:
        value *= tl.load(scale_ptr + offsets, mask=mask, other=1.0)
    value -= weight.to(tl.float32)
    tl.store(out_ptr + rows * width + columns, value.to(out_ptr.dtype.element_ty), mask=mask)
