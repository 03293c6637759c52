"""What searches over candidate scales share: the rows they look at, a candidate's loss, the order.

A search compares many candidates of one linear. It looks at a sample of the rows of a tall weight
(what is told of the result is of all rows), and at coarse steps before fine ones.

Legend: O output features, K input features, N sampled rows, G groups, R rank of a branch, C
candidates, M = C 2 N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from nemo_vlm_ptq.calibrate.losses import group_amax, max_abs, row_losses
from nemo_vlm_ptq.calibrate.solve.clipping import clip_amax, clip_ratios, kernel_supports_group
from nemo_vlm_ptq.calibrate.solve.scales import (
    LinearScales,
    divide_by_pre_quant_scale,
    residual_weight,
    weight_delta,
)
from nemo_vlm_ptq.calibrate.solve.svdquant import low_rank_factors
from nemo_vlm_ptq.formats import QuantFormat

SAMPLE_ROWS = 2048  # rows of a weight that a search looks at
ALPHA_STEPS = 20  # of exponents from 0 to 1
COARSE_TO_FINE = (4, 2, 1)  # strides: 0, 0.2, ... 1.0; then 0.1 and 0.05 beside the best
EXHAUSTIVE = (1,)


@dataclass(frozen=True)
class RowSample:
    """Rows of a weight that stand for all of them.

    rows_N: which they are; weight_NK: in the model's dtype; count_N: float64, rows that each stands
    for; top_K: float32, largest magnitude of each input over all rows.
    """

    rows_N: torch.Tensor
    weight_NK: torch.Tensor
    count_N: torch.Tensor
    top_K: torch.Tensor


def sample_rows(weight_OK: torch.Tensor, group: int, size: int = SAMPLE_ROWS) -> RowSample:
    """All rows, or those that rounding moves most and some of the others.

    Rounding moves a row about as the squares of its groups' maxima. The half of the sample with the
    largest stands for itself, as few rows may hold most of the loss; the other half is taken evenly
    from the rest.
    """
    height, device = len(weight_OK), weight_OK.device
    top_K = max_abs(weight_OK, dim=0)
    if height <= size:
        ones = torch.ones(height, dtype=torch.float64, device=device)
        return RowSample(torch.arange(height, device=device), weight_OK, ones, top_K)
    half = size // 2
    noise_O = group_amax(weight_OK, group).square().mean(dim=1)
    order = noise_O.argsort(descending=True, stable=True)
    rest = order[half:].sort().values
    even = rest[torch.arange(half, device=device) * len(rest) // half]
    rows_N = torch.cat([order[:half], even])
    count_N = torch.ones(2 * half, dtype=torch.float64, device=device)
    count_N[half:] = len(rest) / half
    return RowSample(rows_N, weight_OK[rows_N], count_N, top_K)


def candidate_loss(
    sample: RowSample,
    moment_KK: torch.Tensor,
    row: QuantFormat,
    group: int,
    pre_quant_scale_K: torch.Tensor,
    *,
    amax: torch.Tensor | None = None,
    directions_KR: torch.Tensor | None = None,
) -> torch.Tensor:
    """tr(dW H dW^T) of a prequant scale, float64 [], from a sample's rows.

    Args:
        sample: rows of the weight.
        moment_KK: mean of x x^T.
        row: the format.
        group: inputs that share a weight scale.
        prequant_K: rounded to the model's dtype.
        amax: of the sample's rows; None: plain maxima.
        directions_KR: of the low-rank branch, where the format has one.
    """
    smooth_NK = divide_by_pre_quant_scale(sample.weight_NK, pre_quant_scale_K)
    a_RK = b_NR = top = None
    if directions_KR is None and (row.granularity == "tensor" or row.second_weight is not None):
        top = (
            divide_by_pre_quant_scale(sample.top_K.to(smooth_NK.dtype), pre_quant_scale_K)
            .float()
            .amax()
        )
    elif directions_KR is not None:
        a_RK, b_NR = low_rank_factors(smooth_NK, directions_KR)
        smooth_NK = residual_weight(smooth_NK, (a_RK, b_NR))
        top = smooth_NK.abs().amax().float()  # of the sample: block scales hardly depend on it
    if amax is None and row.granularity == "tensor":
        amax = top
    elif amax is None:
        by_group = row.granularity == "group"
        amax = group_amax(smooth_NK, group) if by_group else max_abs(smooth_NK, dim=1)
    assert amax is not None
    scales = LinearScales(amax, top, None, pre_quant_scale_K, a_RK, b_NR)
    change_NK = weight_delta(sample.weight_NK, smooth_NK, scales, row)
    return row_losses(change_NK, moment_KK) @ sample.count_N


def clipped_losses(
    sample: RowSample,
    moment_KK: torch.Tensor,
    row: QuantFormat,
    group: int,
    pre_quant_scale_CK: torch.Tensor,
) -> torch.Tensor:
    """The loss of each of some scales with the better of plain and clipped maxima, float64 [C].

    As `candidate_loss` and `clip` say one by one; on a GPU all scales go through each operation
    together.
    """
    if sample.weight_NK.is_cuda and kernel_supports_group(group):
        return _losses_together(sample, moment_KK, row, group, pre_quant_scale_CK)
    given = (sample, moment_KK, row, group)
    losses = []
    for pre_quant_scale_K in pre_quant_scale_CK:
        clipped = clip_amax(sample.weight_NK, pre_quant_scale_K, moment_KK, row, group)
        tried = (candidate_loss(*given, pre_quant_scale_K, amax=amax) for amax in (None, clipped))
        losses.append(torch.minimum(*tried))
    return torch.stack(losses)


def _losses_together(
    sample: RowSample,
    moment_KK: torch.Tensor,
    row: QuantFormat,
    group: int,
    pre_quant_scale_CK: torch.Tensor,
) -> torch.Tensor:
    from nemo_vlm_ptq.calibrate import kernels

    weight_NK, second_C = sample.weight_NK, None
    amax_C2NG = kernels.clip_candidates(
        weight_NK, pre_quant_scale_CK, moment_KK, clip_ratios(weight_NK.device), row.weight, group
    )
    if row.second_weight is not None:
        top_K = sample.top_K.to(weight_NK.dtype)
        second_C = (top_K * (1.0 / pre_quant_scale_CK)).to(weight_NK.dtype).float().amax(dim=1)
    change_MK = kernels.weight_delta(
        weight_NK, pre_quant_scale_CK, amax_C2NG.flatten(0, 2), row.weight, second_C, torch.float32
    )
    losses_C2N = row_losses(change_MK, moment_KK).view(amax_C2NG.shape[:3])
    return (losses_C2N @ sample.count_N).amin(dim=1)


def search_alpha(
    losses_of: Callable[[Sequence[float]], torch.Tensor], strides: Sequence[int] = COARSE_TO_FINE
) -> tuple[float, float]:
    """Exponent of the smallest loss, and that loss.

    Args:
        losses_of: exponents -> their losses, float64 [C].
        strides: VALLEY looks at 10 of the 21, which finds the least where the loss over the
            exponent is one valley; EVERY at all.
    """
    found: dict[int, float] = {}

    def look(steps: Iterable[int]) -> int:
        new = [step for step in steps if 0 <= step <= ALPHA_STEPS and step not in found]
        found.update(
            zip(new, losses_of([step / ALPHA_STEPS for step in new]).tolist(), strict=True)
        )
        return min(found, key=lambda step: (found[step], step))

    best = look(range(0, ALPHA_STEPS + 1, strides[0]))
    for stride in strides[1:]:
        best = look((best - stride, best + stride))
    return best / ALPHA_STEPS, found[best]
