"""Clip the amax of each weight group where that lowers the group's own output loss.

The cost of a group is dw E[x x^T] dw^T over its own inputs, that is over the diagonal block of the
second moment. Correlations with other groups are ignored here; the caller keeps the clipped maxima
only if the loss of the whole weight falls.

Legend: O output features, K input features, G groups of g inputs, N rows of a weight, R ratios,
M = R N.
"""

from __future__ import annotations

import functools

import torch

from nemo_vlm_ptq.calibrate.input_moment import InputMoment, diagonal_blocks
from nemo_vlm_ptq.calibrate.losses import allow_tf32, group_amax, row_chunks
from nemo_vlm_ptq.calibrate.solve.fake_quantize import fake_quantize_weight
from nemo_vlm_ptq.calibrate.solve.scales import divide_by_pre_quant_scale, round_amax
from nemo_vlm_ptq.formats import QuantFormat

CLIP_RATIOS = [1 - step / 20 for step in range(11)]  # 1, 0.95, ... 0.5 of the plain amax
CLIP_CHUNK_ELEMENTS = 2**23  # elements processed at once, over all ratios
MAX_KERNEL_GROUP_SIZE = 128  # largest diagonal block that the GPU kernel holds


def kernel_supports_group_size(group_size: int) -> bool:
    """Return whether the GPU kernel supports groups of this size."""
    return 16 <= group_size <= MAX_KERNEL_GROUP_SIZE and group_size & (group_size - 1) == 0


@functools.cache
def clip_ratios(device: torch.device) -> torch.Tensor:
    """Return CLIP_RATIOS on a device, float32."""
    return torch.tensor(CLIP_RATIOS, device=device)


def clip_amax(
    weight_OK: torch.Tensor,
    pre_quant_scale_K: torch.Tensor,
    moment: InputMoment,
    fmt: QuantFormat,
    group_size: int,
) -> torch.Tensor:
    """Return the amax [O,G] of least cost of each group, from 1 to 0.5 of its largest magnitude.

    Args:
        weight_OK: weight in the model's dtype.
        pre_quant_scale_K: rounded to that dtype.
        moment: mean of x x^T; only its diagonal blocks are used.
        fmt: a format with integer weights in groups.
        group_size: inputs that share a weight scale.
    """
    if weight_OK.is_cuda and kernel_supports_group_size(group_size):
        from nemo_vlm_ptq.calibrate.solve import kernels

        ratios = clip_ratios(weight_OK.device)
        return kernels.clip_candidates(
            weight_OK, pre_quant_scale_K[None], moment.blocks_Ggg, ratios, fmt.weight, group_size
        )[0, 1]
    blocks_Ggg = _group_blocks(moment.blocks_Ggg, pre_quant_scale_K, group_size)
    parts = []
    for rows in row_chunks(weight_OK.shape, CLIP_CHUNK_ELEMENTS // len(CLIP_RATIOS)):
        smooth_NK = divide_by_pre_quant_scale(weight_OK[rows], pre_quant_scale_K)
        parts.append(_clip_rows(smooth_NK, group_amax(smooth_NK, group_size), blocks_Ggg, fmt))
    return torch.cat(parts)


def _group_blocks(
    blocks_Bbb: torch.Tensor, pre_quant_scale_K: torch.Tensor, group_size: int
) -> torch.Tensor:
    """Return the second moment of each group's inputs, scaled by the pre_quant_scale, [G,g,g].

    A block holds one or several groups.
    """
    groups_GBgg = torch.stack([diagonal_blocks(block, group_size) for block in blocks_Bbb])
    scale_Gg = pre_quant_scale_K.unflatten(0, (-1, group_size))
    return groups_GBgg.flatten(0, 1) * scale_Gg[:, :, None] * scale_Gg[:, None, :]


def _clip_rows(
    smooth_NK: torch.Tensor, plain_NG: torch.Tensor, blocks_Ggg: torch.Tensor, fmt: QuantFormat
) -> torch.Tensor:
    """Return the amax [N,G] of least cost, evaluating all ratios at once."""
    ratios_R11 = clip_ratios(plain_NG.device)[:, None, None]
    candidates_RNG = round_amax(plain_NG * ratios_R11, smooth_NK.dtype)
    repeated_MK = smooth_NK.repeat(len(CLIP_RATIOS), 1)
    delta_MK = fake_quantize_weight(repeated_MK, candidates_RNG.flatten(0, 1), fmt)
    delta_GMg = delta_MK.sub_(repeated_MK).unflatten(1, (len(blocks_Ggg), -1)).transpose(0, 1)
    with allow_tf32():
        product_GMg = torch.bmm(delta_GMg, blocks_Ggg)
    cost_RNG = product_GMg.mul_(delta_GMg).sum(dim=2).T.reshape(candidates_RNG.shape)
    best_NG = cost_RNG.argmin(dim=0)  # the first of equal costs: the larger amax
    return candidates_RNG.gather(0, best_NG[None])[0]
