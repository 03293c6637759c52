"""Solve: scales for a format from weights and statistics, layer by layer, with no forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nemo_vlm_ptq.calibrate.losses import group_amax
from nemo_vlm_ptq.calibrate.solve.awq import awq
from nemo_vlm_ptq.calibrate.solve.modality_balance import solve_with_image_share
from nemo_vlm_ptq.calibrate.solve.scales import TENSOR_FIELDS, LinearScales, make_scales
from nemo_vlm_ptq.calibrate.solve.smoothquant import smoothquant
from nemo_vlm_ptq.calibrate.statistics import LINEARS, InputStatistics, layer_file
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.numerics import dequantize_nf4_absmax, quantize_nf4_absmax
from nemo_vlm_ptq.parameter_map.entries import ParameterEntry
from nemo_vlm_ptq.parameter_map.sharding import HeadSizes, shard_tensor, unshard_tensor
from nemo_vlm_ptq.workdir.store import save_tensors

ATTENTION_OUTPUT = "linear_proj"
KV = ("key.amax", "value.amax")


def weight_names(layer: int) -> dict[str, str]:
    """Linear -> Megatron's name of its weight in a layer."""
    return {name: f"decoder.layers.{layer}.{path}.weight" for name, path in LINEARS.items()}


@dataclass(frozen=True)
class SolveOptions:
    """What a recipe says of searches.

    smoothquant_alpha: exponent, or that it is searched; image_share: weight of image tokens against
    text tokens in searches, None as they came, or that it is searched.
    """

    smoothquant_alpha: float | Literal["search"] = 1.0
    image_share: float | Literal["search"] | None = None


def solve_layer(
    weights: Mapping[str, torch.Tensor],
    statistics: Mapping[str, InputStatistics],
    row: QuantFormat,
    group_size: int,
    sizes: HeadSizes,
    wishes: SolveOptions = SolveOptions(),
    rows: Iterable[ParameterEntry] = (),
) -> dict[str, LinearScales]:
    """Scales of every linear of a layer.

    Args:
        weights: linear -> whole Megatron weight [O,K] in the model's dtype.
        statistics: linear -> statistics of its input.
        row: the format.
        group_size: the recipe's.
        sizes: head counts of the decoder.
        wishes: what the recipe says of searches.
        rows: the family's table, for formats whose scales depend on Hugging Face's tensors (nf4).
    """
    group, table = row.group(group_size), {one.module_name: one for one in rows}
    solved = {}
    for name, weight in weights.items():
        seen = statistics[name]
        if row.algorithm == "awq":
            folds = name == ATTENTION_OUTPUT and "compressed_tensors" in row.targets
            tie = sizes if folds and sizes.queries_per_kv_head > 1 else None
            solve_at = partial(awq, weight, seen, row, group, tie)
            solved[name] = solve_with_image_share(seen, wishes.image_share, solve_at)
        elif row.algorithm == "smoothquant":
            alpha = wishes.smoothquant_alpha
            solve_at = partial(smoothquant, weight, seen, row, alpha)
            searched = alpha == "search"
            share = wishes.image_share
            solved[name] = (
                solve_with_image_share(seen, share, solve_at) if searched else solve_at(None)
            )
        else:
            amax = None
            if row.weight == "nf4":
                amax = double_quantize_absmax(group_amax(weight, group), table[name], sizes)
            solved[name] = make_scales(weight, seen, row, group, None, amax=amax)
    return solved


def double_quantize_absmax(
    amax_OG: torch.Tensor, row: ParameterEntry, sizes: HeadSizes
) -> torch.Tensor:
    """Absmaxes [O,G] as bitsandbytes reads them back, its double quantization done.

    It goes over the blocks of one Hugging Face tensor, q, k and v apart or as one.

    Args:
        amax_OG: plain, in the order of Megatron's weight.
        row: of that weight.
        sizes: head counts of the decoder.
    """
    parts = [part.contiguous() for part in unshard_tensor(row.sharding, amax_OG, sizes)]
    tensors = [torch.cat(parts)] if row.is_fused else parts
    read = [
        dequantize_nf4_absmax(*quantize_nf4_absmax(one.flatten())).view_as(one) for one in tensors
    ]
    return shard_tensor(row.sharding, read, sizes, 0, 1)


def save_scales(
    folder: Path,
    layer: int,
    scales: Mapping[str, LinearScales],
    kv: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> str:
    """Write a layer's scales, whole and independent of any layout; returns the file's name.

    Args:
        folder: where.
        layer: its index over the whole model.
        scales: linear -> scales.
        kv: amax [1] of keys and of values, rounded to the model's dtype, when they are quantized.
    """
    tensors = {
        f"{linear}.{key}": value
        for linear, entry in scales.items()
        for key, value in entry.tensors().items()
    }
    if kv is not None:
        tensors |= dict(zip(KV, kv, strict=True))
    save_tensors(dict(sorted(tensors.items())), folder / layer_file(layer))
    return layer_file(layer)


def load_scales(folder: Path, layer: int) -> dict[str, LinearScales]:
    """Scales of a layer as written by `save_scales`."""
    tensors = load_file(folder / layer_file(layer))
    return {
        linear: LinearScales(*[tensors.get(f"{linear}.{key}") for key in TENSOR_FIELDS])  # type: ignore[arg-type]
        for linear in LINEARS
    }


def load_kv(folder: Path, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Amax [] of a layer's keys and of its values, as written by `save_scales`."""
    with safe_open(folder / layer_file(layer), framework="pt") as file:
        key, value = (file.get_tensor(name).reshape(()) for name in KV)
    return key, value
