"""AWQ (Lin et al. 2023) from sketches of the inputs, without replaying tokens.

Candidate scales are modelopt's family act^alpha / weight^(1 - alpha) on a finer grid, and no scale
at all. Each candidate is evaluated with the steps that follow it: clipping for formats with groups,
the low-rank branch for SVDQuant. Formats whose exports may fold scales need one scale for all query
heads of a KV head in front of o_proj, so that it can be folded into the rows of v_proj.

Legend: O output features, K input features, N sampled rows of a weight, G groups of g inputs,
C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from nemo_vlm_ptq.calibrate.input_moment import InputMoment
from nemo_vlm_ptq.calibrate.losses import row_chunks
from nemo_vlm_ptq.calibrate.solve.clipping import clip_amax
from nemo_vlm_ptq.calibrate.solve.linear_scales import LinearScales
from nemo_vlm_ptq.calibrate.solve.scales import divide_by_pre_quant_scale, make_scales
from nemo_vlm_ptq.calibrate.solve.search import (
    COARSE_TO_FINE,
    EXHAUSTIVE,
    SAMPLE_ROWS,
    RowSample,
    candidate_loss,
    clipped_losses,
    sample_rows,
    search_alpha,
)
from nemo_vlm_ptq.calibrate.solve.svdquant import low_rank_factors, singular_vector_solver
from nemo_vlm_ptq.calibrate.statistics import InputStatistics
from nemo_vlm_ptq.formats import MIN_AMAX, QuantFormat
from nemo_vlm_ptq.parameter_map.sharding import HeadSizes

CLIPPED_SAMPLE_ROWS = 512  # rows that a search evaluates if it also clips
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class _Objective:
    """Loss of a candidate pre_quant_scale, with clipping or with a low-rank branch.

    solve_vectors: pre_quant_scale [K] -> singular vectors [K,R] of the branch, or None.
    """

    sample: RowSample
    moment: InputMoment
    fmt: QuantFormat
    group_size: int
    solve_vectors: Callable[[torch.Tensor], torch.Tensor] | None

    @property
    def clips(self) -> bool:
        """Whether the amax of groups is clipped."""
        return self.fmt.granularity == "group"

    def loss(
        self, pre_quant_scale_K: torch.Tensor, amax: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the loss of one candidate, float64 [], without clipping."""
        solve = self.solve_vectors
        return candidate_loss(
            self.sample,
            self.moment,
            self.fmt,
            self.group_size,
            pre_quant_scale_K,
            amax=amax,
            vectors_KR=None if solve is None else solve(pre_quant_scale_K),
        )

    def losses(self, pre_quant_scale_CK: torch.Tensor) -> torch.Tensor:
        """Return the losses of candidates, float64 [C]."""
        if self.clips:
            return clipped_losses(
                self.sample, self.moment, self.fmt, self.group_size, pre_quant_scale_CK
            )
        return torch.stack([self.loss(scale_K) for scale_K in pre_quant_scale_CK])


def awq(
    weight_OK: torch.Tensor,
    statistics: InputStatistics,
    fmt: QuantFormat,
    group_size: int,
    shared_heads: HeadSizes | None = None,
    image_share: float | None = None,
    *,
    is_scaled: bool = True,
) -> LinearScales:
    """Search the pre_quant_scale of one linear, then clip its amax or compute its low-rank branch.

    Args:
        weight_OK: weight in the model's dtype.
        statistics: of its input, with second moments.
        fmt: the format.
        group_size: inputs that share a weight scale.
        shared_heads: head counts if query heads of a KV head must share a scale, else None.
        image_share: weight of image tokens in the search; None: their share in the data.
        is_scaled: whether to search a scale; otherwise it is 1.
    """
    weighted = statistics.with_image_share(image_share)
    moment = weighted.moment
    assert moment is not None
    clips = fmt.granularity == "group"
    sample = sample_rows(weight_OK, group_size, CLIPPED_SAMPLE_ROWS if clips else SAMPLE_ROWS)
    compute_scales = candidate_scales(weight_OK, weighted.abs_mean, group_size, shared_heads)
    solve_vectors = singular_vector_solver(weight_OK, fmt.low_rank) if fmt.low_rank else None
    objective = _Objective(
        sample=sample,
        moment=moment,
        fmt=fmt,
        group_size=group_size,
        solve_vectors=solve_vectors,
    )
    alpha, scale_K = None, torch.ones(weight_OK.shape[1], device=weight_OK.device)
    if is_scaled:
        alpha, scale_K = _search(objective, compute_scales)
    branch = amax = None
    if solve_vectors is not None:
        smooth_OK = divide_by_pre_quant_scale(weight_OK, scale_K)
        branch = low_rank_factors(smooth_OK, solve_vectors(scale_K))
    if clips:
        clipped = clip_amax(weight_OK, scale_K, moment, fmt, group_size)
        if bool(objective.loss(scale_K, clipped[sample.rows_N]) < objective.loss(scale_K)):
            amax = clipped
    scales = make_scales(weight_OK, statistics, fmt, group_size, scale_K, branch=branch, amax=amax)
    return replace(scales, alpha=alpha)


def _search(
    objective: _Objective, compute_scales: Callable[[Sequence[float]], torch.Tensor]
) -> tuple[float | None, torch.Tensor]:
    """Return the best exponent and its pre_quant_scale [K]; (None, ones) if no scale is as good."""
    # The loss of nvfp4 formats, which do not clip, has several local minima.
    strides = COARSE_TO_FINE if objective.clips else EXHAUSTIVE
    alpha, loss = search_alpha(lambda alphas: objective.losses(compute_scales(alphas)), strides)
    scale_K = compute_scales([alpha])[0]
    ones_K = torch.ones_like(scale_K)
    if float(objective.losses(ones_K[None])) <= loss:
        return None, ones_K
    return alpha, scale_K


def candidate_scales(
    weight_OK: torch.Tensor,
    abs_mean_K: torch.Tensor,
    group_size: int,
    shared_heads: HeadSizes | None,
) -> Callable[[Sequence[float]], torch.Tensor]:
    """Return a function: exponents -> pre_quant_scales [C,K], rounded to the model's dtype.

    Args:
        weight_OK: weight in that dtype.
        abs_mean_K: mean of |x|.
        group_size: inputs that share a weight scale.
        shared_heads: head counts if query heads of a KV head must share a scale, else None.
    """
    act_K, weight_K = abs_mean_K.clamp(min=TINY), _relative_magnitude(weight_OK, group_size)
    if shared_heads is not None:
        act_K = _mean_per_kv_head(act_K, shared_heads)
        weight_K = _mean_per_kv_head(weight_K, shared_heads)
    is_dead_K = (act_K < 2 * TINY) | (weight_K <= MIN_AMAX)  # without effect: not scaled

    def compute_scales(alphas: Sequence[float]) -> torch.Tensor:
        alpha_C1 = torch.tensor(alphas, device=act_K.device)[:, None]
        scale_CK = (act_K.pow(alpha_C1) / (weight_K.pow(1 - alpha_C1) + TINY)).clamp(1e-4, 1e4)
        largest_C1 = scale_CK.masked_fill(is_dead_K, 0.0).amax(1, keepdim=True)
        least_C1 = scale_CK.masked_fill(is_dead_K, torch.inf).amin(1, keepdim=True)
        scale_CK = scale_CK / (largest_C1 * least_C1).sqrt()
        scale_CK = scale_CK.masked_fill(is_dead_K, 1.0)
        return (1.0 / scale_CK).to(weight_OK.dtype).float()

    return compute_scales


def _relative_magnitude(weight_OK: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return the mean over output features of |w| relative to its group's amax, [K]."""
    total_K = torch.zeros(weight_OK.shape[1], device=weight_OK.device)
    for rows in row_chunks(weight_OK.shape):
        relative_NGg = weight_OK[rows].float().abs().unflatten(1, (-1, group_size))
        relative_NGg.div_(relative_NGg.amax(dim=2, keepdim=True).add_(TINY))
        total_K += relative_NGg.flatten(1).sum(dim=0)
    return total_K / len(weight_OK)


def _mean_per_kv_head(vector_K: torch.Tensor, sizes: HeadSizes) -> torch.Tensor:
    """Average over the query heads of each KV head, and repeat the mean for each of them."""
    heads = vector_K.reshape(sizes.kv_heads, sizes.queries_per_kv_head, sizes.head_dim)
    return heads.mean(dim=1, keepdim=True).expand_as(heads).reshape(-1)
