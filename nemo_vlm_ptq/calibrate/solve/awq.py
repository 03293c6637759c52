"""AWQ from second moments: no token is replayed (Lin et al. 2023 for the method).

The candidates are modelopt's family act^a / weight^(1-a) on a finer grid, and no scaling at all.
Each is judged with what comes after it: in int4 with each group's amax as small as is best, with
SVDQuant with its own branch.
Where an export folds scales, a linear whose input comes from the attention is tied: all query heads
that share a KV head get the same scale per channel, so that it can go into the rows of v.

Legend: O output features, K input features, G groups of g inputs, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from nemo_vlm_ptq.calibrate.losses import row_chunks
from nemo_vlm_ptq.calibrate.solve.clipping import clip_amax
from nemo_vlm_ptq.calibrate.solve.scales import LinearScales, divide_by_pre_quant_scale, make_scales
from nemo_vlm_ptq.calibrate.solve.search import (
    COARSE_TO_FINE,
    EXHAUSTIVE,
    SAMPLE_ROWS,
    candidate_loss,
    clipped_losses,
    sample_rows,
    search_alpha,
)
from nemo_vlm_ptq.calibrate.solve.svdquant import direction_finder, low_rank_factors
from nemo_vlm_ptq.calibrate.statistics import InputStatistics
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.parameter_map.sharding import HeadSizes

CLIPPED_SAMPLE_ROWS = 512  # rows that a search looks at where it also clips
TINY = torch.finfo(torch.float32).tiny


def awq(
    weight_OK: torch.Tensor,
    statistics: InputStatistics,
    row: QuantFormat,
    group: int,
    tie: HeadSizes | None = None,
    share: float | None = None,
) -> LinearScales:
    """Search the scale of one linear, then its clip or its low-rank branch.

    Args:
        weight_OK: weight in the model's dtype.
        statistics: of its input, with second moments.
        row: the format.
        group: inputs that share a weight scale.
        tie: head counts when the input comes from the attention, else None.
        share: weight of image tokens against text tokens in the search; None: as they came.
    """
    seen = statistics.with_image_share(share)
    moment = seen.moment
    assert moment is not None
    clips = row.granularity == "group"
    sample = sample_rows(weight_OK, group, CLIPPED_SAMPLE_ROWS if clips else SAMPLE_ROWS)
    scales_of = candidate_scales(weight_OK, seen.mean, group, tie)
    directions = direction_finder(weight_OK, row.low_rank) if row.low_rank else None

    def loss_of(pre_quant_scale_K: torch.Tensor, amax: torch.Tensor | None = None) -> torch.Tensor:
        along = None if directions is None else directions(pre_quant_scale_K)
        return candidate_loss(
            sample, moment, row, group, pre_quant_scale_K, amax=amax, directions_KR=along
        )

    def losses_of(pre_quant_scale_CK: torch.Tensor) -> torch.Tensor:
        if clips:
            return clipped_losses(sample, moment, row, group, pre_quant_scale_CK)
        return torch.stack([loss_of(pre_quant_scale_K) for pre_quant_scale_K in pre_quant_scale_CK])

    strides = (
        COARSE_TO_FINE if clips else EXHAUSTIVE
    )  # nvfp4's loss has small valleys in the large one
    exponent, loss = search_alpha(lambda alphas: losses_of(scales_of(alphas)), strides)
    alpha: float | None = exponent
    pre_quant_scale = scales_of([exponent])[0]
    unscaled = torch.ones_like(pre_quant_scale)
    if float(losses_of(unscaled[None])) <= loss:
        alpha, pre_quant_scale = None, unscaled
    branch = amax = None
    if directions is not None:
        branch = low_rank_factors(
            divide_by_pre_quant_scale(weight_OK, pre_quant_scale), directions(pre_quant_scale)
        )
    if clips:
        clipped = clip_amax(weight_OK, pre_quant_scale, moment, row, group)
        if bool(loss_of(pre_quant_scale, clipped[sample.rows_N]) < loss_of(pre_quant_scale)):
            amax = clipped
    scales = make_scales(
        weight_OK, statistics, row, group, pre_quant_scale, branch=branch, amax=amax
    )
    return replace(scales, alpha=alpha)


def candidate_scales(
    weight_OK: torch.Tensor, mean_K: torch.Tensor, group: int, tie: HeadSizes | None
) -> Callable[[Sequence[float]], torch.Tensor]:
    """Exponents -> prequant scales [C,K], rounded to the model's dtype.

    Args:
        weight_OK: weight in that dtype.
        mean_K: mean of |x|.
        group: inputs that share a weight scale.
        tie: head counts when the input comes from the attention, else None.
    """
    act, weight = mean_K.clamp(min=TINY), _weight_share(weight_OK, group)
    if tie is not None:
        act, weight = _tied(act, tie), _tied(weight, tie)

    def scales_of(alphas: Sequence[float]) -> torch.Tensor:
        alpha_C1 = torch.tensor(alphas, device=act.device)[:, None]
        scale = (act.pow(alpha_C1) / (weight.pow(1 - alpha_C1) + TINY)).clamp(1e-4, 1e4)
        scale = scale / (scale.amax(1, keepdim=True) * scale.amin(1, keepdim=True)).sqrt()
        return (1.0 / scale).to(weight_OK.dtype).float()

    return scales_of


def _weight_share(weight_OK: torch.Tensor, group: int) -> torch.Tensor:
    """Mean over outputs of |w| relative to its group's largest, [K]."""
    total = torch.zeros(weight_OK.shape[1], device=weight_OK.device)
    for rows in row_chunks(weight_OK.shape):
        share_NGg = weight_OK[rows].float().abs().unflatten(1, (-1, group))
        share_NGg.div_(share_NGg.amax(dim=2, keepdim=True).add_(TINY))
        total += share_NGg.flatten(1).sum(dim=0)
    return total / len(weight_OK)


def _tied(vector_K: torch.Tensor, sizes: HeadSizes) -> torch.Tensor:
    """The mean over query heads that share a KV head, given back to each of them."""
    heads = vector_K.reshape(sizes.kv_heads, sizes.queries_per_kv_head, sizes.head_dim)
    return heads.mean(dim=1, keepdim=True).expand_as(heads).reshape(-1)
