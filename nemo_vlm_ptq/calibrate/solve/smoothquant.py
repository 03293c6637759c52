"""SmoothQuant: how much of the spread of inputs moves into the weights (Xiao et al. 2022).

A large exponent flattens the input, which one scale rounds, and roughens the weight, which a scale
per channel rounds. The recipe says it, or it is searched per linear.

Legend: O output features, K input features, N sampled rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from nemo_vlm_ptq.calibrate.losses import max_abs
from nemo_vlm_ptq.calibrate.solve.scales import (
    LinearScales,
    divide_by_pre_quant_scale,
    make_scales,
    round_amax,
)
from nemo_vlm_ptq.calibrate.solve.search import RowSample, candidate_loss, sample_rows, search_alpha
from nemo_vlm_ptq.calibrate.statistics import InputStatistics
from nemo_vlm_ptq.formats import MAX_CODE, QuantFormat

SILENT_AMAX = 2.0**-31  # inputs not larger than this are left as they are


def smoothing_scale(top_K: torch.Tensor, act_amax_K: torch.Tensor, alpha: float) -> torch.Tensor:
    """The prequant scale [K] of an exponent, as modelopt 0.47 computes it.

    Args:
        top_K: largest |w| of each input.
        act_amax_K: largest |x| of each input.
        alpha: exponent, 0 to 1.
    """
    scale = top_K.pow(1 - alpha) / act_amax_K.pow(alpha)
    return torch.where(act_amax_K <= SILENT_AMAX, torch.ones_like(scale), scale).clamp(1e-4, 1e4)


def smoothquant(
    weight_OK: torch.Tensor,
    statistics: InputStatistics,
    row: QuantFormat,
    alpha: float | Literal["search"],
    share: float | None = None,
) -> LinearScales:
    """Scales of one linear.

    Args:
        weight_OK: weight in the model's dtype.
        statistics: of its input; with second moments if alpha is searched.
        row: the format.
        alpha: exponent, or that it is searched.
        share: weight of image tokens against text tokens in the search; None: as they came.
    """
    width, act_amax = weight_OK.shape[1], statistics.amax.float()
    if alpha == "search":
        alpha = _search(sample_rows(weight_OK, width), statistics.with_image_share(share), row)
    pre_quant_scale = smoothing_scale(max_abs(weight_OK, dim=0), act_amax, alpha)
    return replace(make_scales(weight_OK, statistics, row, width, pre_quant_scale), alpha=alpha)


def _search(sample: RowSample, seen: InputStatistics, row: QuantFormat) -> float:
    """The exponent of least loss, through the rounding of weights and of inputs together."""
    assert seen.moment is not None
    moment, act_amax, dtype = seen.moment, seen.amax.float(), sample.weight_NK.dtype

    def loss_of(alpha: float) -> torch.Tensor:
        pre_quant_scale = smoothing_scale(sample.top_K, act_amax, alpha).to(dtype).float()
        through_weights = candidate_loss(sample, moment, row, len(act_amax), pre_quant_scale)
        smooth_NK = divide_by_pre_quant_scale(sample.weight_NK, pre_quant_scale)
        noise = input_noise(round_amax((act_amax * pre_quant_scale).amax(), dtype))
        size_N = torch.linalg.vector_norm(smooth_NK, dim=1, dtype=torch.float32).double().square()
        return through_weights + noise * (size_N @ sample.count_N)

    return search_alpha(lambda alphas: torch.stack([loss_of(alpha) for alpha in alphas]))[0]


def input_noise(amax: torch.Tensor) -> torch.Tensor:
    """Mean square of the rounding of an int8 input [], taken as even over a step: step^2 / 12.

    Times |W|^2 it is the mean over tokens of |dx W^T|^2, as entries are rounded independently.
    """
    return (amax / MAX_CODE["int8"]).double().square() / 12
