"""Fused kernels for the most frequent operations of calibration on NVIDIA GPUs (Triton).

Each makes one pass over memory where eager PyTorch makes a dozen. The eager code next to every call
defines the result on other devices. Import this module only where tensors are on such a GPU:
Triton is installed with torch's CUDA builds only.

Legend: T tokens, K input features, N rows of a weight, G groups of inputs, C candidate scales,
M rows of a result (N for each candidate).
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nemo_vlm_ptq.formats import MAX_CODE, MIN_AMAX, MIN_CODE, NumberFormat

TOKENS_PER_PROGRAM = 512  # sums of one program; fixed, so that sums do not depend on the width
NO_FMA: dict[str, Any] = {"enable_fp_fusion": False}  # round products as eager PyTorch does
# Adding and subtracting this constant rounds a float to an integer, halves to even.
ROUND_32, ROUND_64 = tl.constexpr(1.5 * 2.0**23), tl.constexpr(1.5 * 2.0**52)
LEAST_AMAX = tl.constexpr(MIN_AMAX)


def column_statistics(
    x_TK: torch.Tensor, modality_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest |x| and the sum of |x| of each column, float32 [2,K] each.

    Args:
        x_TK: tokens; rows must be contiguous.
        modality_T: int8; row 0 of the results is modality 1, row 1 is modality 2, other tokens are
            ignored.
    """
    tokens, width = x_TK.shape
    programs, block_columns = triton.cdiv(tokens, TOKENS_PER_PROGRAM), 128
    out = torch.empty(programs, 2, 2, width, dtype=torch.float32, device=x_TK.device)
    grid = (programs, triton.cdiv(width, block_columns))
    _column_statistics_kernel[grid](
        x_TK, modality_T, out, tokens, width, x_TK.stride(0), TOKENS_PER_PROGRAM, 16, block_columns
    )
    return out[:, 0].amax(dim=0), out[:, 1].sum(dim=0)


def add_rounded(total: torch.Tensor, product: torch.Tensor) -> None:
    """Add round(product) (float32, halves to even) to total (float64) in place; both contiguous."""
    count, block = total.numel(), 1024
    _add_rounded_kernel[(triton.cdiv(count, block),)](total, product, count, block)


def add_signed_rows(
    total_MK: torch.Tensor,
    x_TK: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    signs: torch.Tensor,
    factor: float,
) -> None:
    """Add round(factor * sum of signed tokens) to every row of total (float64) in place.

    The sum of a row is float32, in the order of its tokens.

    Args:
        total_MK: contiguous.
        x_TK: tokens; features must be contiguous.
        order: int64, tokens of row 0, then of row 1, ...
        starts: int64 [M+1], start of each row's tokens in `order`.
        signs: float32, of the tokens in `order`.
        factor: a power of two.
    """
    (rows, width), block = total_MK.shape, 512
    grid = (rows, triton.cdiv(width, block))
    _add_signed_rows_kernel[grid](
        total_MK, x_TK, order, starts, signs, width, x_TK.stride(0), factor, block, **NO_FMA
    )


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
def _column_statistics_kernel(
    x_ptr, modality_ptr, out_ptr, tokens, width, x_stride,
    BLOCK_TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block, columns = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = columns < width
    amax_1 = tl.zeros((ROWS, COLUMNS), tl.float32)
    amax_2 = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_1 = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_2 = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, BLOCK_TOKENS, ROWS):
        rows = block * BLOCK_TOKENS + start + tl.arange(0, ROWS)
        modality = tl.load(modality_ptr + rows, mask=rows < tokens, other=0)[:, None]
        pointers = x_ptr + rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
        mask = (modality > 0) & column_mask[None, :]
        magnitude = tl.abs(tl.load(pointers, mask=mask, other=0.0).to(tl.float32))
        magnitude_1 = tl.where(modality == 1, magnitude, 0.0)
        magnitude_2 = tl.where(modality == 2, magnitude, 0.0)
        amax_1 = tl.maximum(amax_1, magnitude_1)
        amax_2 = tl.maximum(amax_2, magnitude_2)
        sum_1 += magnitude_1
        sum_2 += magnitude_2
    pointers = out_ptr + block.to(tl.int64) * 4 * width + columns
    tl.store(pointers, tl.max(amax_1, 0), mask=column_mask)
    tl.store(pointers + width, tl.max(amax_2, 0), mask=column_mask)
    tl.store(pointers + 2 * width, tl.sum(sum_1, 0), mask=column_mask)
    tl.store(pointers + 3 * width, tl.sum(sum_2, 0), mask=column_mask)


@triton.jit
def _add_rounded_kernel(total_ptr, product_ptr, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    value = tl.load(product_ptr + offsets, mask=mask, other=0.0).to(tl.float64)
    value = (value + ROUND_64) - ROUND_64
    total = tl.load(total_ptr + offsets, mask=mask, other=0.0)
    tl.store(total_ptr + offsets, total + value, mask=mask)


@triton.jit
def _add_signed_rows_kernel(
    total_ptr, x_ptr, order_ptr, starts_ptr, signs_ptr, width, x_stride, factor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    start, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    for position in range(start, end):
        token, sign = tl.load(order_ptr + position), tl.load(signs_ptr + position)
        x = tl.load(x_ptr + token * x_stride + columns, mask=mask, other=0.0)
        total += x.to(tl.float32) * sign
    value = (total * factor).to(tl.float64)
    value = (value + ROUND_64) - ROUND_64
    pointers = total_ptr + row.to(tl.int64) * width + columns
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + value, mask=mask)


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
