"""Clip: the amax of each group tried smaller, where the group's own block of H says so.

The cost of a group is dw H dw^T over its own inputs; what it has in common with other groups is
left to the whole loss, which must fall for the clipped maxima to be kept.

Legend: O output features, K input features, G groups of g inputs, N some rows, R ratios.
"""

from __future__ import annotations

import functools

import torch

from nemo_vlm_ptq.calibrate.losses import fast_products, group_amax, row_chunks
from nemo_vlm_ptq.calibrate.rounding import rounded_weight
from nemo_vlm_ptq.calibrate.scales import divide, stored
from nemo_vlm_ptq.formats import QuantFormat

RATIOS = [1 - step / 20 for step in range(11)]  # 1, 0.95, ... 0.5 of the plain amax
CHUNK = 2**23  # numbers that are worked on at once
WIDEST = 128  # group whose own block of H a GPU's kernel holds


def holds_groups(group: int) -> bool:
    """A kernel can clip groups of this size."""
    return 16 <= group <= WIDEST and group & (group - 1) == 0


@functools.cache
def ratios(device: torch.device) -> torch.Tensor:
    """RATIOS where a kernel reads them, float32."""
    return torch.tensor(RATIOS, device=device)


def clip(
    weight_OK: torch.Tensor,
    prequant_K: torch.Tensor,
    moment_KK: torch.Tensor,
    row: QuantFormat,
    group: int,
) -> torch.Tensor:
    """The amax [O,G] of least cost, group by group, of 1 to 0.5 of the largest magnitude.

    Args:
        weight_OK: weight in the model's dtype.
        prequant_K: rounded to that dtype.
        moment_KK: mean of x x^T.
        row: the format, of whole numbers in groups.
        group: inputs that share a weight scale.
    """
    if weight_OK.is_cuda and holds_groups(group):
        from nemo_vlm_ptq.calibrate import kernels

        tried = ratios(weight_OK.device)
        return kernels.clipped(weight_OK, prequant_K[None], moment_KK, tried, row.weight, group)[
            0, 1
        ]
    blocks_Ggg = _own_blocks(moment_KK, prequant_K, group)
    parts = []
    for rows in row_chunks(weight_OK.shape, CHUNK // len(RATIOS)):
        smooth_NK = divide(weight_OK[rows], prequant_K)
        parts.append(_clip_rows(smooth_NK, group_amax(smooth_NK, group), blocks_Ggg, row))
    return torch.cat(parts)


def _own_blocks(moment_KK: torch.Tensor, prequant_K: torch.Tensor, group: int) -> torch.Tensor:
    """H of each group's own inputs after the prequant scale [G,g,g]."""
    pairs = moment_KK.unflatten(1, (-1, group)).unflatten(0, (-1, group))  # [G,g,G,g]
    own = pairs.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    scale = prequant_K.unflatten(0, (-1, group))
    return own * scale[:, :, None] * scale[:, None, :]


def _clip_rows(
    smooth_NK: torch.Tensor, plain_NG: torch.Tensor, blocks_Ggg: torch.Tensor, row: QuantFormat
) -> torch.Tensor:
    """All ratios at once."""
    tried_RNG = stored(plain_NG * ratios(plain_NG.device)[:, None, None], smooth_NK.dtype)
    every_MK = smooth_NK.repeat(len(RATIOS), 1)  # M = R N
    change_MK = rounded_weight(every_MK, tried_RNG.flatten(0, 1), row).sub_(every_MK)
    change_GMg = change_MK.unflatten(1, (len(blocks_Ggg), -1)).transpose(0, 1)
    with fast_products():
        product_GMg = torch.bmm(change_GMg, blocks_Ggg)
    cost_RNG = product_GMg.mul_(change_GMg).sum(dim=2).T.reshape(tried_RNG.shape)
    best_NG = cost_RNG.argmin(dim=0)  # the first of equals: the larger amax
    return tried_RNG.gather(0, best_NG[None])[0]
