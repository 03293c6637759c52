"""What calibration does most often, each in one pass over memory on an NVIDIA GPU (Triton).

Plain torch says what each computes, on any device; there it takes a dozen passes. Imported where
tensors are on such a GPU, and only there: Triton comes with torch's CUDA builds.

Legend: T tokens, K input features, N rows of a weight, G groups of g inputs.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nemo_vlm_ptq.formats import MAX_CODE, MIN_CODE, NumberFormat

PART = 512  # tokens whose sums one program makes; sums do not depend on the width of the input
EXACT: dict[str, Any] = {"enable_fp_fusion": False}  # products are rounded as torch rounds them
# Added and taken off again they leave a whole number, halves rounded to even.
ROUND_32, ROUND_64 = tl.constexpr(1.5 * 2.0**23), tl.constexpr(1.5 * 2.0**52)


def column_statistics(
    x_TK: torch.Tensor, kind_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest |x| and sum of |x| of each column, float32 [2,K] each: tokens of kind 1, of kind 2.

    Args:
        x_TK: tokens, rows contiguous.
        kind_T: int8; tokens of other kinds are left out.
    """
    tokens, width = x_TK.shape
    parts, columns = triton.cdiv(tokens, PART), 128
    out = torch.empty(parts, 2, 2, width, dtype=torch.float32, device=x_TK.device)
    grid = (parts, triton.cdiv(width, columns))
    _columns[grid](x_TK, kind_T, out, tokens, width, x_TK.stride(0), PART, 16, columns)
    return out[:, 0].amax(dim=0), out[:, 1].sum(dim=0)


def add_rounded(total: torch.Tensor, product: torch.Tensor) -> None:
    """total (float64) += round(product) (float32), halves to even; both contiguous."""
    count, block = total.numel(), 1024
    _add_rounded[(triton.cdiv(count, block),)](total, product, count, block)


def clip_candidates(
    weight_NK: torch.Tensor,
    pre_quant_scale_CK: torch.Tensor,
    moment_KK: torch.Tensor,
    ratios: torch.Tensor,
    kind: NumberFormat,
    group: int,
) -> torch.Tensor:
    """Plain amax of each group, and that of least cost, float32 [C,2,N,G]: see `clip`.

    Args:
        weight_NK: in the model's dtype.
        prequant_CK: float32, a candidate in each row.
        moment_KK: float32, mean of x x^T; only each group's own block is read.
        ratios: float32, of the largest magnitude; of equals the first is taken.
        kind: int4 or another kind of whole numbers.
        group: inputs that share a weight scale.
    """
    (height, width), count = weight_NK.shape, len(pre_quant_scale_CK)
    shape = (count, 2, height, width // group)
    out = torch.empty(shape, dtype=torch.float32, device=weight_NK.device)
    grid = (triton.cdiv(height, 64), width // group, count)
    _clip[grid](
        weight_NK, 1.0 / pre_quant_scale_CK, pre_quant_scale_CK, moment_KK, ratios, out, height, width,
        weight_NK.stride(0), len(ratios), MIN_CODE[kind], MAX_CODE[kind], group, 64,
        num_warps=4, num_stages=1, **EXACT,
    )  # fmt: skip
    return out


def weight_delta(
    weight_NK: torch.Tensor,
    pre_quant_scale_CK: torch.Tensor | None,
    amax: torch.Tensor,
    kind: NumberFormat,
    amax_2: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A weight as its reader sees it less the weight [M,K].

    M is N, or more: then the weight is taken as often as it fits in, and the candidates of the
    scale and of amax_2 have M / C rows each.

    Args:
        weight_NK: in the model's dtype.
        prequant_CK: float32, or None.
        amax: float32, [] or [N] or [M,G].
        kind: fp8, or a kind of whole numbers.
        amax_2: float32 [C], of a second rounding to fp8, or None.
        dtype: of the result.
    """
    height, width = weight_NK.shape
    by_row, by_group, group, rows = 0, 0, width, height
    if amax.dim():
        by_row, rows = amax.stride(0), len(amax)
    if amax.dim() == 2:
        by_group, group = 1, width // amax.shape[1]
    out = torch.empty(rows, width, dtype=dtype, device=weight_NK.device)
    each = rows if pre_quant_scale_CK is None else rows // len(pre_quant_scale_CK)
    back_CK = (
        weight_NK if pre_quant_scale_CK is None else 1.0 / pre_quant_scale_CK
    )  # not read without a scale
    grid = (triton.cdiv(rows, 8), triton.cdiv(width, 256))
    _change[grid](
        weight_NK, back_CK, pre_quant_scale_CK, amax, amax_2, out, rows, height, each, width,
        weight_NK.stride(0), by_row, by_group, group, MIN_CODE[kind], MAX_CODE[kind], MAX_CODE["fp8"],
        kind == "fp8", pre_quant_scale_CK is not None, amax_2 is not None, 8, 256, **EXACT,
    )  # fmt: skip
    return out


@triton.jit
def _columns(
    x, kinds, out, tokens, width, stride,
    PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    part, columns = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    top_1 = tl.zeros((ROWS, COLUMNS), tl.float32)
    top_2 = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_1 = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_2 = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, PART, ROWS):
        rows = part * PART + start + tl.arange(0, ROWS)
        kind = tl.load(kinds + rows, mask=rows < tokens, other=0)[:, None]
        place = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        seen = (kind > 0) & inside[None, :]
        size = tl.abs(tl.load(place, mask=seen, other=0.0).to(tl.float32))
        first = tl.where(kind == 1, size, 0.0)
        second = tl.where(kind == 2, size, 0.0)
        top_1 = tl.maximum(top_1, first)
        top_2 = tl.maximum(top_2, second)
        sum_1 += first
        sum_2 += second
    place = out + part.to(tl.int64) * 4 * width + columns
    tl.store(place, tl.max(top_1, 0), mask=inside)
    tl.store(place + width, tl.max(top_2, 0), mask=inside)
    tl.store(place + 2 * width, tl.sum(sum_1, 0), mask=inside)
    tl.store(place + 3 * width, tl.sum(sum_2, 0), mask=inside)


@triton.jit
def _add_rounded(total, product, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(product + at, mask=inside, other=0.0).to(tl.float64)
    value = (value + ROUND_64) - ROUND_64
    tl.store(total + at, tl.load(total + at, mask=inside, other=0.0) + value, mask=inside)


@triton.jit
def _clip(
    weight, back, pre_quant_scale, moment, ratios, out, height, width, stride, count,
    LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    inside = rows < height
    place = weight + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    own = tl.load(place, mask=inside[:, None], other=0.0)
    at = tl.program_id(2) * width + columns
    smooth = (own.to(tl.float32) * tl.load(back + at)[None, :]).to(own.dtype).to(tl.float32)
    scale = tl.load(pre_quant_scale + at)[None, :]
    place = moment + columns.to(tl.int64)[:, None] * width + columns[None, :]
    block = tl.load(place)
    top = tl.max(tl.abs(smooth), 1)
    least = tl.full((ROWS,), float("inf"), tl.float32)
    best = top
    for step in range(count):
        amax = (top * tl.load(ratios + step)).to(own.dtype).to(tl.float32)
        safe = tl.where(amax > 0, amax, 1.0)
        factor = tl.div_rn(tl.zeros_like(safe) + HIGH, safe)
        codes = ((smooth * factor[:, None]) + ROUND_32) - ROUND_32
        codes = tl.minimum(tl.maximum(codes, LOW), HIGH)
        moved = (codes * tl.div_rn(safe, tl.zeros_like(safe) + HIGH)[:, None] - smooth) * scale
        cost = tl.sum(tl.dot(moved, block) * moved, 1)
        better = cost < least
        least = tl.where(better, cost, least)
        best = tl.where(better, amax, best)
    groups = width // GROUP
    place = (2 * tl.program_id(2) * height + rows).to(tl.int64) * groups + tl.program_id(1)
    tl.store(out + place, top, mask=inside)
    tl.store(out + place + height * groups, best, mask=inside)


@triton.jit
def _nearest_fp8(value):
    """Nearest number of e4m3, halves to even; within its range. Triton's cast asks for an Ada."""
    power = (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.maximum(power, 0.015625) * 0.125
    return (tl.div_rn(value, step) + ROUND_32 - ROUND_32) * step


@triton.jit
def _rounded(value, amax, LOW, HIGH, FP8: tl.constexpr):
    """Codes and back."""
    safe = tl.where(amax > 0, amax, 1.0)
    code = value * tl.div_rn(tl.zeros_like(safe) + HIGH, safe)
    if FP8:
        code = _nearest_fp8(tl.minimum(tl.maximum(code, LOW), HIGH))
    else:
        code = tl.minimum(tl.maximum((code + ROUND_32) - ROUND_32, LOW), HIGH)
    return code * tl.div_rn(safe, tl.zeros_like(safe) + HIGH)


@triton.jit
def _change(
    weight, back, pre_quant_scale, amax, amax_2, out, count, height, each, width,
    stride, by_row, by_group, group,
    LOW: tl.constexpr, HIGH: tl.constexpr, HIGH_2: tl.constexpr, FP8: tl.constexpr,
    SCALED: tl.constexpr, TWICE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (rows < count) & (columns < width)
    own = tl.load(weight + (rows % height) * stride + columns, mask=inside, other=0.0)
    value = own.to(tl.float32)
    at = (rows // each) * width + columns
    if SCALED:
        factor = tl.load(back + at, mask=inside, other=1.0)
        value = (value * factor).to(own.dtype).to(tl.float32)
    place = amax + rows * by_row + (columns // group) * by_group
    value = _rounded(value, tl.load(place, mask=inside, other=1.0), LOW, HIGH, FP8)
    if TWICE:
        top = tl.load(amax_2 + rows // each, mask=rows < count, other=1.0)
        value = _rounded(value, top, -HIGH_2, HIGH_2, True)
    if SCALED:
        value *= tl.load(pre_quant_scale + at, mask=inside, other=1.0)
    value -= own.to(tl.float32)
    tl.store(out + rows * width + columns, value.to(out.dtype.element_ty), mask=inside)
