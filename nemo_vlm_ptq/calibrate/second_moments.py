"""Second moments sum x x^T of one linear's input: the upper triangle in strips of rows.

Strip i of a width K covers rows [i b, (i + 1) b) and the columns from i b on: not much more than
half of the work and memory of the whole. The product of a micro-batch is rounded to a multiple of
UNIT and added in float64, where sums of such multiples are exact up to LIMIT: the order of
micro-batches, and who ran them, leaves no trace. Strips depend on K alone, and tensor ranks share
them out, so every product is the same arithmetic in any layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_vlm_ptq.distributed.layout import strips

UNIT = 2.0**-16
LIMIT = 2.0**53 * UNIT


def zeros(width: int, index: int, device: torch.device) -> torch.Tensor:
    """A strip without tokens, float64 [b, K - i b], in multiples of UNIT."""
    rows = strips(width)[index]
    shape = rows.stop - rows.start, width - rows.start
    return torch.zeros(shape, dtype=torch.float64, device=device)


def accumulate(strip: torch.Tensor, index: int, x_TK: torch.Tensor) -> None:
    """Take the tokens x [T,K] of a micro-batch into a strip; their products are float32."""
    rows = strips(x_TK.shape[1])[index]
    left, right = x_TK[:, rows].T, x_TK[:, rows.start :]
    if x_TK.is_cuda and x_TK.dtype != torch.float32:  # products of 16 bit numbers are exact
        nothing = torch.empty(strip.shape, device=x_TK.device)
        product = torch.addmm(nothing, left, right, torch.float32, beta=0, alpha=1 / UNIT)
    else:
        product = (left.float() @ right.float()).mul_(1 / UNIT)
    if strip.is_cuda:
        from nemo_vlm_ptq.calibrate import kernels

        kernels.add_rounded(strip, product)
    else:
        strip += product.round_()


def to_float32(strip: torch.Tensor) -> torch.Tensor:
    """A strip's sums, float32."""
    return (strip * UNIT).float()


def assemble(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The symmetric [K,K] of all its strips."""
    width = parts[0].shape[1]
    moment = parts[0].new_empty(width, width)
    for rows, part in zip(strips(width), parts, strict=True):
        moment[rows, rows.start :] = part
        moment[rows.start :, rows] = part.T
    return moment
