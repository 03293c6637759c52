"""Clip: the amax of each group tried smaller, where the group's own block of H says so.

The cost of a group is dw H dw^T over its own inputs; what it has in common with other groups is
left to the whole loss, which must fall for the clipped maxima to be kept.

Legend: O output features, K input features, G groups of g inputs, N some rows, R ratios.
"""

from __future__ import annotations

import functools

import torch

from nemo_vlm_ptq.calibrate.losses import allow_tf32, group_amax, row_chunks
from nemo_vlm_ptq.calibrate.solve.fake_quantize import fake_quantize_weight
from nemo_vlm_ptq.calibrate.solve.scales import divide_by_pre_quant_scale, round_amax
from nemo_vlm_ptq.formats import QuantFormat

CLIP_RATIOS = [1 - step / 20 for step in range(11)]  # 1, 0.95, ... 0.5 of the plain amax
CHUNK_ELEMENTS = 2**23  # numbers that are worked on at once
MAX_KERNEL_GROUP = 128  # group whose own block of H a GPU's kernel holds


def kernel_supports_group(group: int) -> bool:
    """A kernel can clip groups of this size."""
    return 16 <= group <= MAX_KERNEL_GROUP and group & (group - 1) == 0


@functools.cache
def clip_ratios(device: torch.device) -> torch.Tensor:
    """RATIOS where a kernel reads them, float32."""
    return torch.tensor(CLIP_RATIOS, device=device)


def clip_amax(
    weight_OK: torch.Tensor,
    pre_quant_scale_K: torch.Tensor,
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
    if weight_OK.is_cuda and kernel_supports_group(group):
        from nemo_vlm_ptq.calibrate import kernels

        tried = clip_ratios(weight_OK.device)
        return kernels.clip_candidates(
            weight_OK, pre_quant_scale_K[None], moment_KK, tried, row.weight, group
        )[0, 1]
    blocks_Ggg = _own_blocks(moment_KK, pre_quant_scale_K, group)
    parts = []
    for rows in row_chunks(weight_OK.shape, CHUNK_ELEMENTS // len(CLIP_RATIOS)):
        smooth_NK = divide_by_pre_quant_scale(weight_OK[rows], pre_quant_scale_K)
        parts.append(_clip_rows(smooth_NK, group_amax(smooth_NK, group), blocks_Ggg, row))
    return torch.cat(parts)


def _own_blocks(
    moment_KK: torch.Tensor, pre_quant_scale_K: torch.Tensor, group: int
) -> torch.Tensor:
    """H of each group's own inputs after the prequant scale [G,g,g]."""
    pairs = moment_KK.unflatten(1, (-1, group)).unflatten(0, (-1, group))  # [G,g,G,g]
    own = pairs.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    scale = pre_quant_scale_K.unflatten(0, (-1, group))
    return own * scale[:, :, None] * scale[:, None, :]


def _clip_rows(
    smooth_NK: torch.Tensor, plain_NG: torch.Tensor, blocks_Ggg: torch.Tensor, row: QuantFormat
) -> torch.Tensor:
    """All ratios at once."""
    tried_RNG = round_amax(plain_NG * clip_ratios(plain_NG.device)[:, None, None], smooth_NK.dtype)
    every_MK = smooth_NK.repeat(len(CLIP_RATIOS), 1)  # M = R N
    change_MK = fake_quantize_weight(every_MK, tried_RNG.flatten(0, 1), row).sub_(every_MK)
    change_GMg = change_MK.unflatten(1, (len(blocks_Ggg), -1)).transpose(0, 1)
    with allow_tf32():
        product_GMg = torch.bmm(change_GMg, blocks_Ggg)
    cost_RNG = product_GMg.mul_(change_GMg).sum(dim=2).T.reshape(tried_RNG.shape)
    best_NG = cost_RNG.argmin(dim=0)  # the first of equals: the larger amax
    return tried_RNG.gather(0, best_NG[None])[0]
