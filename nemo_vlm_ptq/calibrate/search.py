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

from nemo_vlm_ptq.calibrate.clip import clip, holds_groups, ratios
from nemo_vlm_ptq.calibrate.losses import group_amax, largest, row_losses
from nemo_vlm_ptq.calibrate.scales import LinearScales, change, divide, remainder
from nemo_vlm_ptq.calibrate.svdquant import branch_of
from nemo_vlm_ptq.formats import QuantFormat

SAMPLE = 2048  # rows of a weight that a search looks at
STEPS = 20  # of exponents from 0 to 1
VALLEY = (4, 2, 1)  # strides: 0, 0.2, ... 1.0; then 0.1 and 0.05 beside the best
EVERY = (1,)


@dataclass(frozen=True)
class Sample:
    """Rows of a weight that stand for all of them.

    rows_N: which they are; weight_NK: in the model's dtype; count_N: float64, rows that each stands
    for; top_K: float32, largest magnitude of each input over all rows.
    """

    rows_N: torch.Tensor
    weight_NK: torch.Tensor
    count_N: torch.Tensor
    top_K: torch.Tensor


def sample_rows(weight_OK: torch.Tensor, group: int, size: int = SAMPLE) -> Sample:
    """All rows, or those that rounding moves most and some of the others.

    Rounding moves a row about as the squares of its groups' maxima. The half of the sample with the
    largest stands for itself, as few rows may hold most of the loss; the other half is taken evenly
    from the rest.
    """
    height, device = len(weight_OK), weight_OK.device
    top_K = largest(weight_OK, dim=0)
    if height <= size:
        ones = torch.ones(height, dtype=torch.float64, device=device)
        return Sample(torch.arange(height, device=device), weight_OK, ones, top_K)
    half = size // 2
    noise_O = group_amax(weight_OK, group).square().mean(dim=1)
    order = noise_O.argsort(descending=True, stable=True)
    rest = order[half:].sort().values
    even = rest[torch.arange(half, device=device) * len(rest) // half]
    rows_N = torch.cat([order[:half], even])
    count_N = torch.ones(2 * half, dtype=torch.float64, device=device)
    count_N[half:] = len(rest) / half
    return Sample(rows_N, weight_OK[rows_N], count_N, top_K)


def candidate_loss(
    sample: Sample,
    moment_KK: torch.Tensor,
    row: QuantFormat,
    group: int,
    prequant_K: torch.Tensor,
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
    smooth_NK = divide(sample.weight_NK, prequant_K)
    a_RK = b_NR = top = None
    if directions_KR is None and (row.granularity == "tensor" or row.weight_second is not None):
        top = divide(sample.top_K.to(smooth_NK.dtype), prequant_K).float().amax()
    elif directions_KR is not None:
        a_RK, b_NR = branch_of(smooth_NK, directions_KR)
        smooth_NK = remainder(smooth_NK, (a_RK, b_NR))
        top = smooth_NK.abs().amax().float()  # of the sample: block scales hardly depend on it
    if amax is None and row.granularity == "tensor":
        amax = top
    elif amax is None:
        by_group = row.granularity == "group"
        amax = group_amax(smooth_NK, group) if by_group else largest(smooth_NK, dim=1)
    assert amax is not None
    scales = LinearScales(amax, top, None, prequant_K, a_RK, b_NR)
    change_NK = change(sample.weight_NK, smooth_NK, scales, row)
    return row_losses(change_NK, moment_KK) @ sample.count_N


def clipped_losses(
    sample: Sample,
    moment_KK: torch.Tensor,
    row: QuantFormat,
    group: int,
    prequant_CK: torch.Tensor,
) -> torch.Tensor:
    """The loss of each of some scales with the better of plain and clipped maxima, float64 [C].

    As `candidate_loss` and `clip` say one by one; on a GPU all scales go through each operation
    together.
    """
    if sample.weight_NK.is_cuda and holds_groups(group):
        return _losses_together(sample, moment_KK, row, group, prequant_CK)
    given = (sample, moment_KK, row, group)
    losses = []
    for prequant_K in prequant_CK:
        clipped = clip(sample.weight_NK, prequant_K, moment_KK, row, group)
        tried = (candidate_loss(*given, prequant_K, amax=amax) for amax in (None, clipped))
        losses.append(torch.minimum(*tried))
    return torch.stack(losses)


def _losses_together(
    sample: Sample,
    moment_KK: torch.Tensor,
    row: QuantFormat,
    group: int,
    prequant_CK: torch.Tensor,
) -> torch.Tensor:
    from nemo_vlm_ptq.calibrate import kernels

    weight_NK, second_C = sample.weight_NK, None
    amax_C2NG = kernels.clipped(
        weight_NK, prequant_CK, moment_KK, ratios(weight_NK.device), row.weight, group
    )
    if row.weight_second is not None:
        top_K = sample.top_K.to(weight_NK.dtype)
        second_C = (top_K * (1.0 / prequant_CK)).to(weight_NK.dtype).float().amax(dim=1)
    change_MK = kernels.change(
        weight_NK, prequant_CK, amax_C2NG.flatten(0, 2), row.weight, second_C, torch.float32
    )
    losses_C2N = row_losses(change_MK, moment_KK).view(amax_C2NG.shape[:3])
    return (losses_C2N @ sample.count_N).amin(dim=1)


def search_alpha(
    losses_of: Callable[[Sequence[float]], torch.Tensor], strides: Sequence[int] = VALLEY
) -> tuple[float, float]:
    """Exponent of the smallest loss, and that loss.

    Args:
        losses_of: exponents -> their losses, float64 [C].
        strides: VALLEY looks at 10 of the 21, which finds the least where the loss over the
            exponent is one valley; EVERY at all.
    """
    found: dict[int, float] = {}

    def look(steps: Iterable[int]) -> int:
        new = [step for step in steps if 0 <= step <= STEPS and step not in found]
        found.update(zip(new, losses_of([step / STEPS for step in new]).tolist(), strict=True))
        return min(found, key=lambda step: (found[step], step))

    best = look(range(0, STEPS + 1, strides[0]))
    for stride in strides[1:]:
        best = look((best - stride, best + stride))
    return best / STEPS, found[best]
