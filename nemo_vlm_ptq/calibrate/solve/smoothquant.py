"""SmoothQuant: move the spread of a linear's input channels into its weight (Xiao et al. 2022).

A larger exponent flattens the input, which is quantized per tensor, and roughens the weight, which
is quantized per channel. The recipe sets the exponent, or it is searched for each linear.

Legend: K input features, N sampled rows of a weight.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from nemo_vlm_ptq.calibrate.losses import max_abs
from nemo_vlm_ptq.calibrate.solve.linear_scales import LinearScales
from nemo_vlm_ptq.calibrate.solve.scales import divide_by_pre_quant_scale, make_scales, round_amax
from nemo_vlm_ptq.calibrate.solve.search import RowSample, candidate_loss, sample_rows, search_alpha
from nemo_vlm_ptq.calibrate.statistics import InputStatistics
from nemo_vlm_ptq.formats import MAX_CODE, MIN_AMAX, QuantFormat

MIN_INPUT_AMAX = 2.0**-31  # input channels up to this amax are not scaled


def smoothing_scale(
    weight_amax_K: torch.Tensor, input_amax_K: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Return the pre_quant_scale [K] of an exponent, as modelopt 0.47 computes it.

    A pruned channel, whose weights are zero, is at most scaled down to the others' largest input.

    Args:
        weight_amax_K: largest |w| of each input channel.
        input_amax_K: largest |x| of each input channel.
        alpha: exponent, 0 to 1.
    """
    scale = weight_amax_K.pow(1 - alpha) / input_amax_K.pow(alpha)
    scale = torch.where(input_amax_K <= MIN_INPUT_AMAX, torch.ones_like(scale), scale)
    scale = scale.clamp(1e-4, 1e4)
    # A channel of zeros has no weight to roughen; it must not widen the input, nor shrink the scale
    # that folding shares among query heads.
    is_pruned_K = weight_amax_K <= MIN_AMAX
    widest = (input_amax_K * scale).masked_fill(is_pruned_K, 0.0).amax()
    return torch.where(
        is_pruned_K, (widest / input_amax_K.clamp(min=MIN_INPUT_AMAX)).clamp(1e-4, 1.0), scale
    )


def smoothquant(
    weight_OK: torch.Tensor,
    statistics: InputStatistics,
    fmt: QuantFormat,
    alpha: float | Literal["search"],
    image_share: float | None = None,
) -> LinearScales:
    """Return the scales of one linear.

    Args:
        weight_OK: weight in the model's dtype.
        statistics: of its input; with sketches if alpha is searched.
        fmt: the format.
        alpha: exponent, or "search".
        image_share: weight of image tokens in the search; None: their share in the data.
    """
    width, input_amax_K = weight_OK.shape[1], statistics.amax.float()
    if alpha == "search":
        weighted = statistics.with_image_share(image_share)
        alpha = _search(sample_rows(weight_OK, width), weighted, fmt)
    pre_quant_scale = smoothing_scale(max_abs(weight_OK, dim=0), input_amax_K, alpha)
    return replace(make_scales(weight_OK, statistics, fmt, width, pre_quant_scale), alpha=alpha)


def _search(sample: RowSample, statistics: InputStatistics, fmt: QuantFormat) -> float:
    """Return the exponent of least loss from quantizing both the weight and the input."""
    moment, dtype = statistics.moment, sample.weight_NK.dtype
    assert moment is not None
    input_amax_K = statistics.amax.float()

    def compute_loss(alpha: float) -> torch.Tensor:
        scale_K = smoothing_scale(sample.amax_K, input_amax_K, alpha).to(dtype).float()
        weight_loss = candidate_loss(sample, moment, fmt, len(input_amax_K), scale_K)
        smooth_NK = divide_by_pre_quant_scale(sample.weight_NK, scale_K)
        noise = input_noise(round_amax((input_amax_K * scale_K).amax(), dtype))
        norm_N = torch.linalg.vector_norm(smooth_NK, dim=1, dtype=torch.float32)
        return weight_loss + noise * (norm_N.double().square() @ sample.count_N)

    return search_alpha(lambda alphas: torch.stack([compute_loss(alpha) for alpha in alphas]))[0]


def input_noise(amax: torch.Tensor) -> torch.Tensor:
    """Return the mean square of the rounding error of an int8 input, step^2 / 12, [].

    Rounding errors are taken as uniform over a step and independent, so that the mean over tokens
    of |dx W^T|^2 is this number times |W|^2.
    """
    return (amax / MAX_CODE["int8"]).double().square() / 12
