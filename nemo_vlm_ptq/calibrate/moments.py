"""Second moments sum x x^T of one linear's input: the upper triangle in strips of rows.

Strip i of a width K covers rows [i b, (i + 1) b) and the columns from i b on: little more than half
of the work and memory of the whole. Products are added in 64-bit fixed point, in which the order
of micro-batches, and who ran them, leaves no trace. Strips depend on K alone, and tensor ranks
share them out, so every product is the same arithmetic in any layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_vlm_ptq.parallel import strips

UNIT = 2.0**-20  # of the fixed point, which then reaches to 2**43
LIMIT = 2.0**43


def empty(width: int, index: int, device: torch.device) -> torch.Tensor:
    """A strip without tokens, int64 [b, K - i b]."""
    rows = strips(width)[index]
    return torch.zeros(rows.stop - rows.start, width - rows.start, dtype=torch.int64, device=device)


def add(strip: torch.Tensor, index: int, x_TK: torch.Tensor) -> None:
    """Take the tokens x [T,K] into a strip: products and sums of a micro-batch in float32."""
    rows = strips(x_TK.shape[1])[index]
    left, right = x_TK[:, rows].T, x_TK[:, rows.start :]
    if x_TK.is_cuda and x_TK.dtype != torch.float32:
        product = torch.mm(left, right, out_dtype=torch.float32)  # products are exact
    else:
        product = left.float() @ right.float()
    strip += product.mul_(1 / UNIT).round_().long()


def values(strip: torch.Tensor) -> torch.Tensor:
    """A strip's sums, float32."""
    return (strip.double() * UNIT).float()


def whole(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The symmetric [K,K] of all its strips."""
    width = parts[0].shape[1]
    moment = parts[0].new_empty(width, width)
    for rows, part in zip(strips(width), parts, strict=True):
        moment[rows, rows.start :] = part
        moment[rows.start :, rows] = part.T
    return moment
