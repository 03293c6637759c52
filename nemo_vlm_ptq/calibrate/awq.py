"""AWQ from second moments: the loss of a candidate is tr(dW H dW^T), the number that replaying all
tokens would give, so no token is replayed (Lin et al. 2023 for the method).

The candidates are modelopt's family act^a / weight^(1-a) on a finer grid, and no scaling at all;
then each group's amax is tried smaller. A linear whose input comes from the attention is tied: all
query heads that share a KV head get the same scale per channel, so that it can be folded into the
rows of v by readers that have no prequant scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from nemo_vlm_ptq.calibrate.scales import (
    LinearScales,
    divide,
    finish,
    output_error,
    rounded_weight,
    stored,
    weighted_norm,
)
from nemo_vlm_ptq.calibrate.statistics import InputStatistics
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.mapping.layouts import Sizes
from nemo_vlm_ptq.numerics import round_trip, weight_amax

ALPHAS = [step / 20 for step in range(21)]
CLIPS = [1 - step / 20 for step in range(1, 11)]  # 0.95 .. 0.5 of the group's amax
TINY = torch.finfo(torch.float32).tiny


def awq(
    weight_OK: torch.Tensor,
    statistics: InputStatistics,
    row: QuantFormat,
    group: int,
    tie: Sizes | None,
) -> LinearScales:
    """Search scale and clip of one linear.

    Args:
        weight_OK: weight in the model's dtype.
        statistics: of its input, with second moments.
        row: the format.
        group: inputs that share a weight scale.
        tie: head counts when the input comes from the attention, else None.
    """
    moment = statistics.moment
    assert moment is not None
    best_loss, best_alpha, best_prequant = None, None, None
    for alpha, prequant in _candidates(weight_OK, statistics, group, tie):
        smooth = divide(weight_OK, prequant)
        amax = weight_amax(smooth, row.granularity, group)
        seen = rounded_weight(smooth, amax, row, smooth.float().abs().amax())
        loss = float(weighted_norm(seen * prequant - weight_OK.float(), moment))
        if best_loss is None or loss < best_loss:
            best_loss, best_alpha, best_prequant = loss, alpha, prequant
    assert best_loss is not None and best_prequant is not None
    scales = replace(finish(weight_OK, statistics, row, group, best_prequant), alpha=best_alpha)
    return _clip(weight_OK, scales, moment, row, best_loss)


def _candidates(
    weight_OK: torch.Tensor,
    statistics: InputStatistics,
    group: int,
    tie: Sizes | None,
) -> Iterator[tuple[float | None, torch.Tensor]]:
    """(alpha, prequant scale [K]); alpha None is no scaling."""
    act, weight = statistics.mean.clamp(min=TINY), _weight_share(weight_OK, group)
    if tie is not None:
        act, weight = _tied(act, tie), _tied(weight, tie)
    yield None, torch.ones_like(act)
    for alpha in ALPHAS:
        scale = (act.pow(alpha) / (weight.pow(1 - alpha) + TINY)).clamp(1e-4, 1e4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        yield alpha, (1.0 / scale).to(weight_OK.dtype).float()


def _weight_share(weight_OK: torch.Tensor, group: int) -> torch.Tensor:
    """Mean over outputs of |w| relative to its group's largest, [K]."""
    grouped = weight_OK.float().abs().unflatten(1, (-1, group))
    share = grouped / (grouped.amax(dim=2, keepdim=True) + TINY)
    return share.flatten(1).mean(dim=0)


def _tied(vector_K: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """The mean over query heads that share a KV head, given back to each of them."""
    heads = vector_K.reshape(sizes.kv_heads, sizes.queries, sizes.head_dim)
    return heads.mean(dim=1, keepdim=True).expand_as(heads).reshape(-1)


def _clip(
    weight_OK: torch.Tensor,
    scales: LinearScales,
    moment_KK: torch.Tensor,
    row: QuantFormat,
    loss: float,
) -> LinearScales:
    """Smaller amax per group where the group's own block of H says so and the whole loss falls."""
    assert scales.prequant is not None
    smooth = divide(weight_OK, scales.prequant).float()
    groups = scales.weight_amax.shape[1]
    blocks = torch.stack(
        [
            block.unflatten(1, (groups, -1))[:, index]
            for index, block in enumerate(moment_KK.unflatten(0, (groups, -1)))
        ]
    )  # [G,g,g]
    back = scales.prequant.unflatten(0, (groups, -1))
    best = torch.full_like(scales.weight_amax, float("inf"))
    amax = scales.weight_amax
    for ratio in [1.0, *CLIPS]:
        tried = stored(scales.weight_amax * ratio, weight_OK.dtype)
        change = round_trip(smooth, tried, row.weight) - smooth
        change_OGg = change.unflatten(1, (groups, -1)) * back
        cost = torch.einsum("ogi,gij,ogj->og", change_OGg, blocks, change_OGg)
        amax = torch.where(cost < best, tried, amax)
        best = torch.minimum(best, cost)
    change = rounded_weight(smooth, amax, row, scales.weight_amax_2) * scales.prequant
    change = change - weight_OK.float()
    if float(weighted_norm(change, moment_KK)) >= loss:
        return scales
    return replace(scales, weight_amax=amax, error=output_error(weight_OK, change, moment_KK))
