"""Record of the scales of one linear, and its rows and shards.

Legend: O output features, K input features, G groups of inputs, R rank of a low-rank branch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from nemo_vlm_ptq.calibrate.statistics import ROW_PARALLEL

TENSOR_FIELDS = (
    "weight_amax",
    "weight_amax_2",
    "input_amax",
    "pre_quant_scale",
    "low_rank_a",
    "low_rank_b",
)
METRIC_FIELDS = ("error", "error_text", "error_image", "alpha", "image_share")
LowRank = tuple[torch.Tensor, torch.Tensor]  # a [R,K] and b [O,R], in the model's dtype


@dataclass(frozen=True)
class LinearScales:
    """Scales of one linear, and metrics of how they were chosen.

    weight_amax: [], [O] or [O,G]. For nvfp4 [], as its block scales follow from the weight; for nf4
        [O,G], after double quantization.
    weight_amax_2: [], of a second weight quantization, or None.
    input_amax: [], of a static input quantization, or None.
    pre_quant_scale: [K], or None.
    low_rank_a, low_rank_b: [R,K] and [O,R] in the model's dtype, or None: the 16 bit low-rank
        branch b a, subtracted from the weight after its division by pre_quant_scale.
    alpha: exponent of the pre_quant_scale, or None.
    image_share: weight of image tokens in the search, or None.
    error: relative error of the output caused by weight quantization, over all tokens, 0 if the
        output is zero:
        sqrt(tr(dW E[x x^T] dW^T) / tr(W E[x x^T] W^T)), as a sketch estimates it; None without
        second moments.
    error_text, error_image: the same over the tokens of one modality.
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
        """The low-rank branch (a, b), or None."""
        if self.low_rank_a is None or self.low_rank_b is None:
            return None
        return self.low_rank_a, self.low_rank_b

    def metrics(self) -> dict[str, float | None]:
        """Return the metrics that a manifest lists."""
        return {name: getattr(self, name) for name in METRIC_FIELDS}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are set, by field name."""
        return {name: t for name in TENSOR_FIELDS if (t := getattr(self, name)) is not None}

    def to(self, device: torch.device | str) -> LinearScales:
        """Return a copy with its tensors on a device."""
        tensors: dict[str, Any] = {name: t.to(device) for name, t in self.tensors().items()}
        return replace(self, **tensors)


def select_rows(scales: LinearScales, rows: slice) -> LinearScales:
    """Return the scales of some rows of a weight."""
    amax, b_OR = scales.weight_amax, scales.low_rank_b
    return replace(
        scales,
        weight_amax=amax[rows] if amax.dim() else amax,
        low_rank_b=None if b_OR is None else b_OR[rows],
    )


def shard_scales(scales: LinearScales, linear: str, t: int, T: int) -> LinearScales:
    """Return the scales of tensor-parallel shard `t` of `T` of a whole Megatron weight.

    qkv rows are stored per KV head, so a shard is contiguous; gate and up of fc1 are sharded
    separately.
    """

    def shard_rows(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 or linear in ROW_PARALLEL:
            return tensor
        if linear == "linear_fc1":
            return torch.cat([half.chunk(T)[t] for half in tensor.chunk(2)])
        return tensor.chunk(T)[t]

    def shard_inputs(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(T, dim=-1)[t] if linear in ROW_PARALLEL else tensor

    amax, scale, branch = shard_rows(scales.weight_amax), scales.pre_quant_scale, scales.branch
    return LinearScales(
        weight_amax=shard_inputs(amax) if amax.dim() == 2 else amax,
        weight_amax_2=scales.weight_amax_2,
        input_amax=scales.input_amax,
        pre_quant_scale=None if scale is None else shard_inputs(scale),
        low_rank_a=None if branch is None else shard_inputs(branch[0]),
        low_rank_b=None if branch is None else shard_rows(branch[1]),
    )
