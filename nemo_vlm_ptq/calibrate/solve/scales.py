"""Scales of one linear for each algorithm: pure arithmetic on a weight and its input statistics.

Legend: O output features, K input features, G groups of K, R rank of a branch, N some rows of O. A
`prequant` scale multiplies the input of a linear; the weight is divided by it. It is rounded to the
model's dtype before the weight is divided, so that what is stored is what was divided by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from nemo_vlm_ptq.calibrate.losses import (
    gram_dtype,
    gram_matrix,
    group_amax,
    row_chunks,
    weighted_trace,
)
from nemo_vlm_ptq.calibrate.solve.fake_quantize import fake_quantize_weight
from nemo_vlm_ptq.calibrate.statistics import ROW_PARALLEL, InputStatistics
from nemo_vlm_ptq.formats import QuantFormat

TENSOR_FIELDS = (
    "weight_amax",
    "weight_amax_2",
    "input_amax",
    "pre_quant_scale",
    "low_rank_a",
    "low_rank_b",
)
METRIC_FIELDS = ("error", "error_text", "error_image", "alpha", "image_share")
STATIC_INPUTS = ("fp8", "int8", "nvfp4")  # roundings of inputs that need an amax
LowRank = tuple[torch.Tensor, torch.Tensor]  # a [R,K] and b [O,R], in the model's dtype


@dataclass(frozen=True)
class LinearScales:
    """What solve says of one linear.

    weight_amax: [] or [O] or [O,G] (nvfp4: [], its blocks follow from the weight; nf4: [O,G], after
    double quantization); weight_amax_2: [] or None; input_amax: [] or None; prequant: [K] or None;
    low_rank_a [R,K] and low_rank_b [O,R] in the model's dtype or None: the 16 bit branch b a that
    was taken off the weight after its division by prequant.

    alpha: chosen exponent; image_share: weight of image tokens that it was searched with; error:
    relative error of the output through the weights, sqrt(tr(dW H dW^T) / tr(W H W^T)), over all
    tokens as they came, and over those of text and of images. None where there is no such thing.
    """

    weight_amax: torch.Tensor
    weight_amax_2: torch.Tensor | None = None
    input_amax: torch.Tensor | None = None
    pre_quant_scale: torch.Tensor | None = None
    low_rank_a: torch.Tensor | None = None
    low_rank_b: torch.Tensor | None = None
    alpha: float | None = None
    image_share: float | None = None
    error: float | None = None
    error_text: float | None = None
    error_image: float | None = None

    @property
    def branch(self) -> LowRank | None:
        """The 16 bit branch (a, b), or None."""
        if self.low_rank_a is None or self.low_rank_b is None:
            return None
        return self.low_rank_a, self.low_rank_b

    def metrics(self) -> dict[str, float | None]:
        """What is told of the linear in a manifest."""
        return {name: getattr(self, name) for name in METRIC_FIELDS}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by field name."""
        return {name: t for name in TENSOR_FIELDS if (t := getattr(self, name)) is not None}

    def to_cpu(self) -> LinearScales:
        """The same in host memory."""
        moved: dict[str, Any] = {name: tensor.cpu() for name, tensor in self.tensors().items()}
        return replace(self, **moved)


def round_amax(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An amax as modelopt's quantizers keep it once a checkpoint is restored: in the model's dtype.

    Codes made from anything finer would not be those of the restored model.
    """
    return amax.to(dtype).float()


def divide_by_pre_quant_scale(
    weight_OK: torch.Tensor, pre_quant_scale_K: torch.Tensor | None
) -> torch.Tensor:
    """The weight that goes with a prequant scale, in the weight's dtype."""
    if pre_quant_scale_K is None:
        return weight_OK
    back_K = 1.0 / pre_quant_scale_K.float()
    return torch.mul(weight_OK, back_K, out=torch.empty_like(weight_OK))  # no float32 in between


def residual_weight(smooth_OK: torch.Tensor, branch: LowRank | None) -> torch.Tensor:
    """What is left to round of a weight divided by its prequant scale, in its dtype.

    b a is summed in float64: so a cut of it has the bits of the whole, on any device.
    """
    if branch is None:
        return smooth_OK
    a_RK, b_OR = branch
    product_OK = (b_OR.double() @ a_RK.double()).float()
    return (smooth_OK.float() - product_OK).to(smooth_OK.dtype)


def make_scales(
    weight_OK: torch.Tensor,
    statistics: InputStatistics,
    row: QuantFormat,
    group: int,
    pre_quant_scale_K: torch.Tensor | None,
    *,
    branch: LowRank | None = None,
    amax: torch.Tensor | None = None,
) -> LinearScales:
    """Scales of a linear whose prequant scale is settled, and the error that they make.

    Args:
        weight_OK: weight in the model's dtype.
        statistics: of its input.
        row: the format.
        group: inputs that share a weight scale.
        prequant_K: or None; it is rounded to the model's dtype.
        branch: what is taken off after the division.
        amax: maxima of the weight; None: plain ones.
    """
    if pre_quant_scale_K is not None:
        pre_quant_scale_K = pre_quant_scale_K.to(weight_OK.dtype).float()
    plain, top = _maxima(weight_OK, row, group, pre_quant_scale_K, branch)
    input_amax = None
    if row.activation in STATIC_INPUTS:
        spread = (
            statistics.amax if pre_quant_scale_K is None else statistics.amax * pre_quant_scale_K
        )
        input_amax = round_amax(spread.amax(), weight_OK.dtype)
    a_RK, b_OR = branch or (None, None)
    scales = LinearScales(
        plain if amax is None else amax,
        None if row.second_weight is None else top,
        input_amax,
        pre_quant_scale_K,
        a_RK,
        b_OR,
    )
    return scales if statistics.moment is None else _with_errors(scales, weight_OK, statistics, row)


def _parts(
    weight_OK: torch.Tensor, pre_quant_scale_K: torch.Tensor | None, branch: LowRank | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some rows after others, and what is rounded of them."""
    for rows in row_chunks(weight_OK.shape):
        own = None if branch is None else (branch[0], branch[1][rows])
        yield (
            rows,
            residual_weight(divide_by_pre_quant_scale(weight_OK[rows], pre_quant_scale_K), own),
        )


def _maxima(
    weight_OK: torch.Tensor,
    row: QuantFormat,
    group: int,
    pre_quant_scale_K: torch.Tensor | None,
    branch: LowRank | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain amax of the format's granularity, and that of the whole tensor."""
    width = group if row.granularity == "group" else weight_OK.shape[1]
    parts = _parts(weight_OK, pre_quant_scale_K, branch)
    amax_OG = torch.cat([group_amax(part_NK, width) for _, part_NK in parts])
    top = amax_OG.amax()
    if row.granularity == "tensor":
        return top, top
    return (amax_OG if row.granularity == "group" else amax_OG[:, 0]), top


def weight_delta(
    weight_NK: torch.Tensor,
    part_NK: torch.Tensor,
    scales: LinearScales,
    row: QuantFormat,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """What a reader's output goes through less the weight [N,K].

    Args:
        weight_NK: the weight.
        part_NK: what is rounded of it.
        scales: of these rows.
        row: the format.
        dtype: of the result; computed in float32.
    """
    if weight_NK.is_cuda and scales.branch is None and row.weight in ("fp8", "int8", "int4"):
        from nemo_vlm_ptq.calibrate import kernels

        one, second = scales.pre_quant_scale, scales.weight_amax_2
        return kernels.weight_delta(
            weight_NK,
            None if one is None else one[None],
            scales.weight_amax,
            row.weight,
            None if row.second_weight is None or second is None else second[None],
            dtype,
        )
    seen_NK = fake_quantize_weight(part_NK, scales.weight_amax, row, scales.weight_amax_2)
    if scales.branch is not None:
        a_RK, b_NR = scales.branch
        seen_NK.addmm_(b_NR.float(), a_RK.float())
    if scales.pre_quant_scale is not None:
        seen_NK.mul_(scales.pre_quant_scale)
    return seen_NK.sub_(weight_NK).to(dtype)


def _with_errors(
    scales: LinearScales,
    weight_OK: torch.Tensor,
    statistics: InputStatistics,
    row: QuantFormat,
) -> LinearScales:
    """The scales with the relative errors that they make."""
    parts = _parts(weight_OK, scales.pre_quant_scale, scales.branch)
    dtype = gram_dtype(weight_OK.device)
    moved_KK = gram_matrix(
        weight_delta(weight_OK[rows], part, _rows(scales, rows), row, dtype) for rows, part in parts
    )
    output_power = statistics.with_output_power(weight_OK).output_power
    moved = [weighted_trace(moved_KK, one) for one in statistics.moments.values()]
    ratios = torch.stack(moved) / torch.stack([output_power[kind] for kind in statistics.moments])
    errors = dict(zip(statistics.moments, ratios.clamp(min=0).sqrt().tolist(), strict=True))
    return replace(
        scales,
        error=errors["all"],
        error_text=errors.get("text"),
        error_image=errors.get("image"),
    )


def _rows(scales: LinearScales, rows: slice) -> LinearScales:
    """The scales of some rows of a weight."""
    amax, b_OR = scales.weight_amax, scales.low_rank_b
    return replace(
        scales,
        weight_amax=amax[rows] if amax.dim() else amax,
        low_rank_b=None if b_OR is None else b_OR[rows],
    )


def shard_scales(scales: LinearScales, linear: str, t: int, T: int) -> LinearScales:
    """The scales of tensor shard `t` of `T`, from those of the whole Megatron weight.

    qkv rows are stored KV group by KV group, so a shard is a contiguous cut; gate and up of fc1
    are cut apart.
    """

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 or linear in ROW_PARALLEL:
            return tensor
        if linear == "linear_fc1":
            return torch.cat([half.chunk(T)[t] for half in tensor.chunk(2)])
        return tensor.chunk(T)[t]

    def inputs(tensor: torch.Tensor) -> torch.Tensor:
        """Of the last axis."""
        return tensor.chunk(T, dim=-1)[t] if linear in ROW_PARALLEL else tensor

    amax, pre_quant_scale, branch = rows(scales.weight_amax), scales.pre_quant_scale, scales.branch
    return LinearScales(
        inputs(amax) if amax.dim() == 2 else amax,
        scales.weight_amax_2,
        scales.input_amax,
        None if pre_quant_scale is None else inputs(pre_quant_scale),
        None if branch is None else inputs(branch[0]),
        None if branch is None else rows(branch[1]),
    )
