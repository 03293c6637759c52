"""Fused kernels that add up statistics of inputs on NVIDIA GPUs (Triton).

Each makes one pass over memory where eager PyTorch makes a dozen. The eager code next to every call
defines the result on other devices. Import this module only where tensors are on such a GPU:
Triton is installed with torch's CUDA builds only.

Legend: T tokens, K input features, M rows of a sketch, G diagonal blocks of g features.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

TOKENS_PER_PROGRAM = 512  # sums of one program; fixed, so that sums do not depend on the width
TOKEN_PARTS = 4  # a block's products are summed in parts of the tokens, then the parts in order
MIN_BLOCK = 16  # features, of a product on tensor cores
ROUND_64 = tl.constexpr(1.5 * 2.0**52)  # adding and subtracting it rounds float64, halves to even


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


def add_rounded(total: torch.Tensor, products: torch.Tensor, factor: float) -> None:
    """Add round(factor * sum of products), halves to even, to the total in place.

    Args:
        total: float64, contiguous.
        products: float32 [parts, *total.shape], contiguous; parts are summed in order.
        factor: a power of two.
    """
    count, block = total.numel(), 1024
    grid = (triton.cdiv(count, block),)
    _add_rounded_kernel[grid](total, products, count, factor, len(products), block)


def add_blocks(
    blocks_2Ggg: torch.Tensor, x_TK: torch.Tensor, modality_T: torch.Tensor, factor: float
) -> None:
    """Add round(factor * x^T x) of each modality's tokens to its diagonal blocks in place.

    Args:
        blocks_2Ggg: float64, of modality 1, then of modality 2; contiguous; g is a power of two of
            at least MIN_BLOCK.
        x_TK: tokens in 16 bit, whose products float32 holds; features must be contiguous.
        modality_T: int8; tokens of other modalities are ignored.
        factor: a power of two.
    """
    _, count, features, _ = blocks_2Ggg.shape
    shape = (TOKEN_PARTS, *blocks_2Ggg.shape)
    product = torch.empty(shape, dtype=torch.float32, device=x_TK.device)
    part = triton.cdiv(triton.cdiv(len(x_TK), TOKEN_PARTS), 64) * 64
    _block_products_kernel[count, 2, TOKEN_PARTS](
        x_TK, modality_T, product, len(x_TK), part, x_TK.stride(0), features, 64, num_warps=8
    )
    add_rounded(blocks_2Ggg, product, factor)


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
        total_MK,
        x_TK,
        order,
        starts,
        signs,
        width,
        x_TK.stride(0),
        factor,
        block,
        enable_fp_fusion=False,  # round products as eager PyTorch does
    )


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
def _block_products_kernel(
    x_ptr, modality_ptr, out_ptr, tokens, part, x_stride, FEATURES: tl.constexpr, ROWS: tl.constexpr
):
    block, row = tl.program_id(0), tl.program_id(1)
    features = tl.arange(0, FEATURES)
    columns = block * FEATURES + features
    total = tl.zeros((FEATURES, FEATURES), tl.float32)
    begin = tl.program_id(2) * part
    for start in range(begin, min(begin + part, tokens), ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = tl.load(modality_ptr + rows, mask=rows < tokens, other=0) == row + 1
        if tl.max(mask.to(tl.int32), 0) > 0:
            pointers = x_ptr + rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
            x = tl.load(pointers, mask=mask[:, None], other=0.0)
            total = tl.dot(tl.trans(x), x, total)
    index = (tl.program_id(2) * tl.num_programs(1) + row) * tl.num_programs(0) + block
    offsets = features[:, None] * FEATURES + features[None, :]
    tl.store(out_ptr + index.to(tl.int64) * FEATURES * FEATURES + offsets, total)


@triton.jit
def _add_rounded_kernel(
    total_ptr, product_ptr, count, factor, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    product = tl.load(product_ptr + offsets, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        product += tl.load(product_ptr + part * count + offsets, mask=mask, other=0.0)
    value = (product * factor).to(tl.float64)
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
