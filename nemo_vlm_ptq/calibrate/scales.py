"""Scales of one linear for each algorithm: pure arithmetic on a weight and its input statistics.

Legend: O output features, K input features, G groups of K. A `prequant` scale multiplies the input
of a linear; the weight is divided by it. It is rounded to the model's dtype before the weight is
divided, so that what is stored is what was divided by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_vlm_ptq.calibrate.statistics import ROW_PARALLEL, InputStatistics
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.numerics import round_trip, weight_amax

FIELDS = ("weight_amax", "weight_amax_2", "input_amax", "prequant", "low_rank_a", "low_rank_b")
SMOOTHQUANT_ALPHA = 1.0  # modelopt's default for INT8_SMOOTHQUANT_CFG


@dataclass(frozen=True)
class LinearScales:
    """What solve says of one linear.

    weight_amax: [] or [O] or [O,G] (nvfp4: [], its blocks follow from the weight; nf4: [O,G], after
    double quantization); weight_amax_2: [] or None; input_amax: [] or None; prequant: [K] or None;
    low_rank_a [r,K] and low_rank_b [O,r] in the model's dtype or None: the 16 bit branch b a that
    was taken off the weight after its division by prequant; alpha: chosen exponent or None;
    error: relative error of the output through the weights, sqrt(tr(dW H dW^T) / tr(W H W^T)),
    or None without second moments.
    """

    weight_amax: torch.Tensor
    weight_amax_2: torch.Tensor | None = None
    input_amax: torch.Tensor | None = None
    prequant: torch.Tensor | None = None
    low_rank_a: torch.Tensor | None = None
    low_rank_b: torch.Tensor | None = None
    alpha: float | None = None
    error: float | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by field name."""
        return {name: t for name in FIELDS if (t := getattr(self, name)) is not None}


def stored(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An amax as modelopt's quantizers keep it once a checkpoint is restored: in the model's dtype.

    Codes made from anything finer would not be those of the restored model.
    """
    return amax.to(dtype).float()


def divide(weight_OK: torch.Tensor, prequant_K: torch.Tensor | None) -> torch.Tensor:
    """The weight that goes with a prequant scale, in the weight's dtype."""
    if prequant_K is None:
        return weight_OK
    return (weight_OK.float() * (1.0 / prequant_K.float())).to(weight_OK.dtype)


def smoothquant(weight_OK: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
    """SmoothQuant's prequant scale [K] (Xiao et al. 2022), as modelopt 0.47 computes it."""
    act_amax = statistics.amax.float()
    column_amax = weight_OK.float().abs().amax(dim=0)
    scale = column_amax.pow(1 - SMOOTHQUANT_ALPHA) / act_amax.pow(SMOOTHQUANT_ALPHA)
    silent = act_amax <= 2.0**-31
    return torch.where(silent, torch.ones_like(scale), scale).clamp(1e-4, 1e4)


def rounded_weight(
    weight_OK: torch.Tensor,
    amax: torch.Tensor,
    row: QuantFormat,
    amax_2: torch.Tensor | None,
) -> torch.Tensor:
    """The weight as a reader of the format sees it, float32 [O,K]."""
    values = round_trip(weight_OK, amax, row.weight)
    if row.weight_second is not None and amax_2 is not None:
        values = round_trip(values, amax_2, row.weight_second)
    return values


def output_error(
    weight_OK: torch.Tensor, change_OK: torch.Tensor, moment_KK: torch.Tensor
) -> float:
    """sqrt(tr(dW H dW^T) / tr(W H W^T)): how far the output moves, relative to its size."""
    before = weighted_norm(weight_OK.float(), moment_KK)
    return float((weighted_norm(change_OK, moment_KK) / before).clamp(min=0).sqrt())


def weighted_norm(matrix_OK: torch.Tensor, moment_KK: torch.Tensor) -> torch.Tensor:
    """tr(A H A^T): the mean over tokens of |A x|^2; its product may take TF32 on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    product = matrix_OK @ moment_KK
    torch.set_float32_matmul_precision(before)
    return (product * matrix_OK).sum(dtype=torch.float64)


def finish(
    weight_OK: torch.Tensor,
    statistics: InputStatistics,
    row: QuantFormat,
    group: int,
    prequant_K: torch.Tensor | None,
) -> LinearScales:
    """Scales of a linear whose prequant scale is settled, with plain maxima for its weight."""
    if prequant_K is not None:
        prequant_K = prequant_K.to(weight_OK.dtype).float()
    smooth = divide(weight_OK, prequant_K)
    amax = weight_amax(smooth, row.granularity, group)
    amax_2 = None if row.weight_second is None else smooth.float().abs().amax()
    input_amax = None
    if row.activation is not None:
        spread = statistics.amax if prequant_K is None else statistics.amax * prequant_K
        input_amax = stored(spread.amax(), weight_OK.dtype)
    error = None
    if statistics.moment is not None:
        seen = rounded_weight(smooth, amax, row, amax_2)
        seen = seen if prequant_K is None else seen * prequant_K
        error = output_error(weight_OK, seen - weight_OK.float(), statistics.moment)
    return LinearScales(amax, amax_2, input_amax, prequant_K, error=error)


def cut_scales(scales: LinearScales, linear: str, t: int, T: int) -> LinearScales:
    """The scales of tensor shard `t` of `T`, from those of the whole Megatron weight.

    qkv rows are stored KV group by KV group, so a shard is a contiguous cut; gate and up of fc1
    are cut apart.
    """
    amax = scales.weight_amax
    if T > 1 and amax.dim():
        if linear in ROW_PARALLEL:
            amax = amax if amax.dim() == 1 else amax.chunk(T, dim=1)[t]
        elif linear == "linear_fc1":
            amax = torch.cat([half.chunk(T)[t] for half in amax.chunk(2)])
        else:
            amax = amax.chunk(T)[t]
    prequant = scales.prequant
    if prequant is not None and linear in ROW_PARALLEL:
        prequant = prequant.chunk(T)[t]
    return LinearScales(amax, scales.weight_amax_2, scales.input_amax, prequant)
