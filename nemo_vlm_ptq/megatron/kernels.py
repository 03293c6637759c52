"""Fused kernels of the decoder's forward pass on NVIDIA GPUs (Triton).

Megatron-core's own need TransformerEngine or `torch.compile`. Every intermediate result is rounded
to the tensors' dtype, as the eager code does that defines the result on other devices. Import this
module only where tensors are on such a GPU.

Legend: S tokens, B samples, D head dimension, N rows, F features.
"""

# ruff: noqa: N803, N806
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

NO_FMA: dict[str, Any] = {"enable_fp_fusion": False}  # round products as eager PyTorch does


def rotate(x: torch.Tensor, cos_ND: torch.Tensor, sin_ND: torch.Tensor) -> torch.Tensor:
    """Return x cos + rotate_half(x) sin, [S,B,heads,D].

    Args:
        x: [S,B,heads,D]; the features of a head are contiguous.
        cos_ND: in x's dtype, a row per token, or per token and sample: N is S or S B.
        sin_ND: in x's dtype.
    """
    S, B, heads, D = x.shape
    out = torch.empty(S, B, heads, D, dtype=x.dtype, device=x.device)
    block_heads = 16
    grid = (S * B, triton.cdiv(heads, block_heads))
    _rotate_kernel[grid](
        x, cos_ND, sin_ND, out, B, S * B // len(cos_ND), heads,
        x.stride(0), x.stride(1), x.stride(2),
        D // 2, block_heads, triton.next_power_of_2(D // 2), **NO_FMA,
    )  # fmt: skip
    return out


def gated_silu(x_NF: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, [N,F/2], of rows [gate | up]."""
    rows, width = x_NF.shape[0], x_NF.shape[1] // 2
    out = torch.empty(rows, width, dtype=x_NF.dtype, device=x_NF.device)
    block = 1024
    _gated_silu_kernel[(rows, triton.cdiv(width, block))](
        x_NF, out, width, x_NF.stride(0), block, **NO_FMA
    )
    return out


@triton.jit
def _rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, samples, sharing, heads,
    stride_token, stride_sample, stride_head,
    HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token, sample = row // samples, row % samples
    head, column = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    column_mask = column < HALF
    mask = (head < heads)[:, None] & column_mask[None, :]
    pointers = x_ptr + token * stride_token + sample * stride_sample
    pointers += head[:, None] * stride_head + column[None, :]
    first = tl.load(pointers, mask=mask, other=0.0)
    second = tl.load(pointers + HALF, mask=mask, other=0.0)
    angles = row // sharing * 2 * HALF + column  # of the tokens that share a row
    cos_1 = tl.load(cos_ptr + angles, mask=column_mask, other=0.0)[None, :].to(tl.float32)
    sin_1 = tl.load(sin_ptr + angles, mask=column_mask, other=0.0)[None, :].to(tl.float32)
    cos_2 = tl.load(cos_ptr + angles + HALF, mask=column_mask, other=0.0)[None, :].to(tl.float32)
    sin_2 = tl.load(sin_ptr + angles + HALF, mask=column_mask, other=0.0)[None, :].to(tl.float32)
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    out_1 = (first * cos_1).to(dtype).to(tl.float32) + (-second * sin_1).to(dtype).to(tl.float32)
    out_2 = (second * cos_2).to(dtype).to(tl.float32) + (first * sin_2).to(dtype).to(tl.float32)
    pointers = out_ptr + (row * heads + head[:, None]) * 2 * HALF + column[None, :]
    tl.store(pointers, out_1.to(dtype), mask=mask)
    tl.store(pointers + HALF, out_2.to(dtype), mask=mask)


@triton.jit
def _gated_silu_kernel(x_ptr, out_ptr, width, x_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
    up = tl.load(x_ptr + row * x_stride + width + columns, mask=mask, other=0.0)
    value = gate.to(tl.float32)
    silu = (value / (1.0 + tl.exp(-value))).to(gate.dtype).to(tl.float32)
    out = (silu * up.to(tl.float32)).to(gate.dtype)
    tl.store(out_ptr + row * width + columns, out, mask=mask)
