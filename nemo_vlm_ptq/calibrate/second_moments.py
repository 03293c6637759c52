"""Second moments sum x x^T of a linear's input, stored as strips of the upper triangle.

Strip i of a [K,K] second moment holds the rows [i b, (i + 1) b) and the columns from i b on, which
takes little more than half of the work and memory of the full matrix. Each micro-batch's product is
rounded to a multiple of MOMENT_UNIT and added in float64, where sums of such multiples are exact up
to MOMENT_LIMIT. The result therefore depends neither on the order of micro-batches nor on the rank
that runs them. Strips depend on K alone and tensor ranks own whole strips, so every product is the
same arithmetic in any layout.

Legend: T tokens, K input features, b rows of a strip.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_vlm_ptq.distributed.moment_strips import strips

MOMENT_UNIT = 2.0**-16
MOMENT_LIMIT = 2.0**53 * MOMENT_UNIT


def zero_strip(width: int, index: int, device: torch.device) -> torch.Tensor:
    """Return strip `index` without tokens, float64 [b, K - i b], in multiples of MOMENT_UNIT."""
    rows = strips(width)[index]
    shape = rows.stop - rows.start, width - rows.start
    return torch.zeros(shape, dtype=torch.float64, device=device)


def accumulate_strip(strip: torch.Tensor, index: int, x_TK: torch.Tensor) -> None:
    """Add the tokens of a micro-batch to a strip in place; their product is float32.

    Args:
        strip: from `zero_strip`.
        index: its index.
        x_TK: tokens.
    """
    rows = strips(x_TK.shape[1])[index]
    left, right = x_TK[:, rows].T, x_TK[:, rows.start :]
    if x_TK.is_cuda and x_TK.dtype != torch.float32:  # products of 16 bit numbers are exact
        ignored = torch.empty(strip.shape, device=x_TK.device)  # beta=0: not read
        product = torch.addmm(ignored, left, right, torch.float32, beta=0, alpha=1 / MOMENT_UNIT)
    else:
        product = (left.float() @ right.float()).mul_(1 / MOMENT_UNIT)
    if strip.is_cuda:
        from nemo_vlm_ptq.calibrate import sum_kernels

        sum_kernels.add_rounded(strip, product[None], 1.0)
    else:
        strip += product.round_()


def strip_to_float32(strip: torch.Tensor) -> torch.Tensor:
    """Return the sums of a strip as float32, no longer in multiples of MOMENT_UNIT."""
    return (strip * MOMENT_UNIT).float()


def assemble_strips(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the symmetric [K,K] matrix of all its strips."""
    width = parts[0].shape[1]
    second_moment_KK = parts[0].new_empty(width, width)
    for rows, part in zip(strips(width), parts, strict=True):
        second_moment_KK[rows, rows.start :] = part
        second_moment_KK[rows.start :, rows] = part.T
    return second_moment_KK
