"""Parts that the searches over candidate scales share: row sampling, losses, order of evaluation.

A search compares many candidates of one linear. It evaluates a sample of the rows of a tall weight
(the reported error covers all rows), and a coarse grid of exponents before finer ones.

Legend: O output features, K input features, N sampled rows, G groups of inputs, R rank of a
low-rank branch, C candidates, M = C 2 N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from nemo_vlm_ptq.calibrate.input_moment import InputMoment
from nemo_vlm_ptq.calibrate.losses import group_amax, max_abs
from nemo_vlm_ptq.calibrate.solve.clipping import (
    clip_amax,
    clip_ratios,
    kernel_supports_group_size,
)
from nemo_vlm_ptq.calibrate.solve.linear_scales import LinearScales
from nemo_vlm_ptq.calibrate.solve.scales import (
    divide_by_pre_quant_scale,
    residual_weight,
    weight_delta,
)
from nemo_vlm_ptq.calibrate.solve.svdquant import low_rank_factors
from nemo_vlm_ptq.formats import QuantFormat

SAMPLE_ROWS = 2048  # rows of a weight that a search evaluates
ALPHA_STEPS = 20  # intervals between exponents 0 and 1
COARSE_TO_FINE = (4, 2, 1)  # strides: 0, 0.2, ... 1; then 0.1 and 0.05 on both sides of the best
EXHAUSTIVE = (1,)


@dataclass(frozen=True)
class RowSample:
    """Rows of a weight that represent all of them.

    rows_N: indices of the rows.
    weight_NK: the rows, in the model's dtype.
    count_N: float64, number of rows that each represents.
    amax_K: float32, largest magnitude of each input feature over all rows.
    """

    rows_N: torch.Tensor
    weight_NK: torch.Tensor
    count_N: torch.Tensor
    amax_K: torch.Tensor


def sample_rows(weight_OK: torch.Tensor, group_size: int, size: int = SAMPLE_ROWS) -> RowSample:
    """Return all rows, or `size` rows: those with the largest quantization noise, and some others.

    The noise of a row is about proportional to the mean square of its groups' maxima. The noisiest
    rows make up half of the sample and represent only themselves, because few rows may cause most
    of the loss. The other half is spread evenly over the remaining rows.
    """
    height, device = len(weight_OK), weight_OK.device
    amax_K = max_abs(weight_OK, dim=0)
    if height <= size:
        rows_N = torch.arange(height, device=device)
        count_N = torch.ones(height, dtype=torch.float64, device=device)
        return RowSample(rows_N=rows_N, weight_NK=weight_OK, count_N=count_N, amax_K=amax_K)
    half = size // 2
    noise_O = group_amax(weight_OK, group_size).square().mean(dim=1)
    order = noise_O.argsort(descending=True, stable=True)
    rest = order[half:].sort().values
    spread = rest[torch.arange(half, device=device) * len(rest) // half]
    rows_N = torch.cat([order[:half], spread])
    count_N = torch.ones(2 * half, dtype=torch.float64, device=device)
    count_N[half:] = len(rest) / half
    return RowSample(rows_N=rows_N, weight_NK=weight_OK[rows_N], count_N=count_N, amax_K=amax_K)


def candidate_loss(
    sample: RowSample,
    moment: InputMoment,
    fmt: QuantFormat,
    group_size: int,
    pre_quant_scale_K: torch.Tensor,
    *,
    amax: torch.Tensor | None = None,
    vectors_KR: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the output loss tr(dW E[x x^T] dW^T) of a pre_quant_scale, float64 [].

    Args:
        sample: rows of the weight.
        moment: mean of x x^T.
        fmt: the format.
        group_size: inputs that share a weight scale.
        pre_quant_scale_K: rounded to the model's dtype.
        amax: amax of the sample's rows; None: the largest magnitudes.
        vectors_KR: singular vectors of the low-rank branch, for formats that have one.
    """
    smooth_NK = divide_by_pre_quant_scale(sample.weight_NK, pre_quant_scale_K)
    a_RK = b_NR = tensor_amax = None
    if vectors_KR is None and (fmt.granularity == "tensor" or fmt.second_weight is not None):
        amax_K = sample.amax_K.to(smooth_NK.dtype)
        tensor_amax = divide_by_pre_quant_scale(amax_K, pre_quant_scale_K).float().amax()
    elif vectors_KR is not None:
        a_RK, b_NR = low_rank_factors(smooth_NK, vectors_KR)
        smooth_NK = residual_weight(smooth_NK, (a_RK, b_NR))
        tensor_amax = smooth_NK.abs().amax().float()  # of the sample: hardly affects block scales
    if amax is None and fmt.granularity == "tensor":
        amax = tensor_amax
    elif amax is None:
        is_grouped = fmt.granularity == "group"
        amax = group_amax(smooth_NK, group_size) if is_grouped else max_abs(smooth_NK, dim=1)
    assert amax is not None
    scales = LinearScales(
        weight_amax=amax,
        weight_amax_2=tensor_amax,
        pre_quant_scale=pre_quant_scale_K,
        low_rank_a=a_RK,
        low_rank_b=b_NR,
    )
    delta_NK = weight_delta(sample.weight_NK, smooth_NK, scales, fmt)
    return moment.row_losses(delta_NK) @ sample.count_N


def clipped_losses(
    sample: RowSample,
    moment: InputMoment,
    fmt: QuantFormat,
    group_size: int,
    pre_quant_scale_CK: torch.Tensor,
) -> torch.Tensor:
    """Return each candidate's loss with the better of plain and clipped maxima, float64 [C].

    The result is that of `candidate_loss` and `clip_amax` for each candidate. On a GPU every
    operation processes all candidates at once.
    """
    if sample.weight_NK.is_cuda and kernel_supports_group_size(group_size):
        return _clipped_losses_batched(sample, moment, fmt, group_size, pre_quant_scale_CK)
    losses = []
    for pre_quant_scale_K in pre_quant_scale_CK:
        clipped = clip_amax(sample.weight_NK, pre_quant_scale_K, moment, fmt, group_size)
        plain_loss, clipped_loss = (
            candidate_loss(sample, moment, fmt, group_size, pre_quant_scale_K, amax=amax)
            for amax in (None, clipped)
        )
        losses.append(torch.minimum(plain_loss, clipped_loss))
    return torch.stack(losses)


def _clipped_losses_batched(
    sample: RowSample,
    moment: InputMoment,
    fmt: QuantFormat,
    group_size: int,
    pre_quant_scale_CK: torch.Tensor,
) -> torch.Tensor:
    """Implement `clipped_losses` with GPU kernels."""
    from nemo_vlm_ptq.calibrate.solve import kernels

    weight_NK, amax_2_C = sample.weight_NK, None
    ratios = clip_ratios(weight_NK.device)
    amax_C2NG = kernels.clip_candidates(
        weight_NK, pre_quant_scale_CK, moment.blocks_Ggg, ratios, fmt.weight, group_size
    )
    if fmt.second_weight is not None:
        amax_K = sample.amax_K.to(weight_NK.dtype)
        amax_2_C = (amax_K * (1.0 / pre_quant_scale_CK)).to(weight_NK.dtype).float().amax(dim=1)
    amax_MG = amax_C2NG.flatten(0, 2)
    delta_MK = kernels.weight_delta(
        weight_NK, pre_quant_scale_CK, amax_MG, fmt.weight, amax_2_C, torch.float32
    )
    losses_C2N = moment.row_losses(delta_MK).view(amax_C2NG.shape[:3])
    return (losses_C2N @ sample.count_N).amin(dim=1)


def search_alpha(
    compute_losses: Callable[[Sequence[float]], torch.Tensor],
    strides: Sequence[int] = COARSE_TO_FINE,
) -> tuple[float, float]:
    """Return the exponent of the smallest loss, and that loss.

    Args:
        compute_losses: exponents -> their losses, float64 [C].
        strides: COARSE_TO_FINE evaluates 10 of the 21 exponents and finds the minimum of a loss
            with a single local minimum; EXHAUSTIVE evaluates all.
    """
    losses: dict[int, float] = {}

    def evaluate(steps: Iterable[int]) -> int:
        """Evaluate new steps and return the best of all so far."""
        new = [step for step in steps if 0 <= step <= ALPHA_STEPS and step not in losses]
        values = compute_losses([step / ALPHA_STEPS for step in new]).tolist()
        losses.update(zip(new, values, strict=True))
        return min(losses, key=lambda step: (losses[step], step))

    best = evaluate(range(0, ALPHA_STEPS + 1, strides[0]))
    for stride in strides[1:]:
        best = evaluate((best - stride, best + stride))
    return best / ALPHA_STEPS, losses[best]
