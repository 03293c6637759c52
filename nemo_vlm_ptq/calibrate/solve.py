"""Solve: scales for a format from weights and statistics, layer by layer, with no forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.calibrate.awq import awq
from nemo_vlm_ptq.calibrate.scales import LinearScales, finish, smoothquant
from nemo_vlm_ptq.calibrate.statistics import LINEARS, InputStatistics, layer_file
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.mapping.layouts import Sizes
from nemo_vlm_ptq.store import save_tensors

ATTENTION_OUTPUT = "linear_proj"


def weight_names(layer: int) -> dict[str, str]:
    """Linear -> Megatron's name of its weight in a layer."""
    return {name: f"decoder.layers.{layer}.{path}.weight" for name, path in LINEARS.items()}


def solve_layer(
    weights: Mapping[str, torch.Tensor],
    statistics: Mapping[str, InputStatistics],
    row: QuantFormat,
    group: int,
    sizes: Sizes,
) -> dict[str, LinearScales]:
    """Scales of every linear of a layer.

    Args:
        weights: linear -> whole Megatron weight [O,K] in the model's dtype.
        statistics: linear -> statistics of its input.
        row: the format.
        group: inputs that share a weight scale, for formats with groups.
        sizes: head counts of the decoder.
    """
    solved = {}
    for name, weight in weights.items():
        seen = statistics[name]
        if row.algorithm == "awq":
            tie = sizes if name == ATTENTION_OUTPUT and sizes.queries > 1 else None
            solved[name] = awq(weight, seen, row, group, tie)
        else:
            prequant = smoothquant(weight, seen) if row.algorithm == "smoothquant" else None
            solved[name] = finish(weight, seen, row, group, prequant)
    return solved


def save_scales(folder: Path, layer: int, scales: Mapping[str, LinearScales]) -> str:
    """Write a layer's scales, whole and independent of any layout; returns the file's name."""
    tensors = {
        f"{linear}.{key}": value
        for linear, entry in scales.items()
        for key, value in entry.tensors().items()
    }
    save_tensors(dict(sorted(tensors.items())), folder / layer_file(layer))
    return layer_file(layer)


def load_scales(folder: Path, layer: int) -> dict[str, LinearScales]:
    """Scales of a layer as written by `save_scales`."""
    tensors = load_file(folder / layer_file(layer))
    return {
        linear: LinearScales(
            tensors[f"{linear}.weight_amax"],
            tensors.get(f"{linear}.weight_amax_2"),
            tensors.get(f"{linear}.input_amax"),
            tensors.get(f"{linear}.prequant"),
        )
        for linear in LINEARS
    }
