"""Solve one decoder layer: scales for a format from weights and statistics, without forward passes.

The scales of a layer are stored whole, independently of the parallel layout.

Legend: O output features, K input features, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nemo_vlm_ptq.calibrate.losses import group_amax
from nemo_vlm_ptq.calibrate.solve.awq import awq
from nemo_vlm_ptq.calibrate.solve.linear_scales import TENSOR_FIELDS, LinearScales
from nemo_vlm_ptq.calibrate.solve.modality_balance import solve_with_image_share
from nemo_vlm_ptq.calibrate.solve.scales import make_scales
from nemo_vlm_ptq.calibrate.solve.smoothquant import smoothquant
from nemo_vlm_ptq.calibrate.statistics import LINEARS, InputStatistics, layer_file
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.numerics import dequantize_nf4_absmax, quantize_nf4_absmax
from nemo_vlm_ptq.parameter_map.entries import ParameterEntry
from nemo_vlm_ptq.parameter_map.sharding import HeadSizes, shard_tensor, unshard_tensor
from nemo_vlm_ptq.workdir.checked_files import checked_file
from nemo_vlm_ptq.workdir.store import save_tensors

ATTENTION_OUTPUT = "linear_proj"
KV_AMAX_KEYS = ("key.amax", "value.amax")
STORED_FIELDS = {"pre_quant_scale": "prequant"}  # key in files, where it is not the field's name


def weight_names(layer: int) -> dict[str, str]:
    """Return linear -> Megatron name of its weight in a layer."""
    return {name: f"decoder.layers.{layer}.{path}.weight" for name, path in LINEARS.items()}


@dataclass(frozen=True)
class SolveOptions:
    """Search options of the recipe.

    smoothquant_alpha: exponent, or "search".
    image_share: weight of image tokens in searches, None for their share in the calibration data,
        or "search".
    """

    smoothquant_alpha: float | Literal["search"] = 1.0
    image_share: float | Literal["search"] | None = None


def solve_layer(
    weights: Mapping[str, torch.Tensor],
    statistics: Mapping[str, InputStatistics],
    fmt: QuantFormat,
    group_size: int,
    sizes: HeadSizes,
    options: SolveOptions = SolveOptions(),
    parameter_map: Iterable[ParameterEntry] = (),
    unscaled: Collection[str] = (),
) -> dict[str, LinearScales]:
    """Return linear -> scales of a layer.

    Args:
        weights: linear -> whole Megatron weight [O,K] in the model's dtype.
        statistics: linear -> statistics of its input.
        fmt: the format.
        group_size: of the recipe; formats with a fixed block ignore it.
        sizes: head counts of the layer.
        options: search options.
        parameter_map: entries of the layer, for nf4, whose scales depend on how Hugging Face
            splits a weight.
        unscaled: linears whose pre_quant_scale is 1.
    """
    entries = {entry.module_name: entry for entry in parameter_map}
    inputs_per_scale = fmt.group(group_size)
    solved = {}
    for name, weight in weights.items():
        linear_statistics = statistics[name]
        if fmt.algorithm == "awq":
            shares_scale = name == ATTENTION_OUTPUT and fmt.shares_kv_head_scale
            shared_heads = sizes if shares_scale and sizes.queries_per_kv_head > 1 else None
            solve = partial(
                awq,
                weight,
                linear_statistics,
                fmt,
                inputs_per_scale,
                shared_heads,
                is_scaled=name not in unscaled,
            )
            solved[name] = solve_with_image_share(linear_statistics, options.image_share, solve)
        elif fmt.algorithm == "smoothquant" and name in unscaled:
            ones = torch.ones(weight.shape[1], device=weight.device)
            solved[name] = make_scales(weight, linear_statistics, fmt, inputs_per_scale, ones)
        elif fmt.algorithm == "smoothquant":
            alpha = options.smoothquant_alpha
            solve = partial(smoothquant, weight, linear_statistics, fmt, alpha)
            if alpha == "search":
                solved[name] = solve_with_image_share(linear_statistics, options.image_share, solve)
            else:
                solved[name] = solve(None)
        else:
            amax = None
            if fmt.weight == "nf4":
                absmax_OG = group_amax(weight, inputs_per_scale)
                amax = double_quantize_absmax(absmax_OG, entries[name], sizes)
            solved[name] = make_scales(
                weight, linear_statistics, fmt, inputs_per_scale, None, amax=amax
            )
    return solved


def double_quantize_absmax(
    absmax_OG: torch.Tensor, entry: ParameterEntry, sizes: HeadSizes
) -> torch.Tensor:
    """Quantize and dequantize nf4 absmaxes as bitsandbytes does with double quantization, [O,G].

    Double quantization processes the blocks of one Hugging Face tensor, with q, k and v separate or
    fused.

    Args:
        absmax_OG: in the row order of the Megatron weight.
        entry: of that weight.
        sizes: head counts of the decoder.
    """
    parts = [part.contiguous() for part in unshard_tensor(entry.sharding, absmax_OG, sizes)]
    hf_tensors = [torch.cat(parts)] if entry.is_fused else parts
    dequantized = [
        dequantize_nf4_absmax(*quantize_nf4_absmax(absmax.flatten())).view_as(absmax)
        for absmax in hf_tensors
    ]
    return shard_tensor(entry.sharding, dequantized, sizes, 0, 1)


def save_scales(
    folder: Path,
    layer: int,
    scales: Mapping[str, LinearScales],
    kv_amax: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> str:
    """Write the scales of a layer and return the file's name.

    Args:
        folder: where to write.
        layer: index in the whole model.
        scales: linear -> scales.
        kv_amax: [1] of keys and of values in the model's dtype, if the KV cache is quantized.
    """
    tensors = {
        _stored_key(linear, field): tensor
        for linear, linear_scales in scales.items()
        for field, tensor in linear_scales.tensors().items()
    }
    if kv_amax is not None:
        tensors |= dict(zip(KV_AMAX_KEYS, kv_amax, strict=True))
    save_tensors(dict(sorted(tensors.items())), folder / layer_file(layer))
    return layer_file(layer)


def load_scales(folder: Path, layer: int) -> dict[str, LinearScales]:
    """Load the scales of a layer written by `save_scales`."""
    tensors = load_file(checked_file(folder, layer_file(layer)))
    return {
        linear: LinearScales(
            **{field: tensors.get(_stored_key(linear, field)) for field in TENSOR_FIELDS}  # type: ignore[arg-type]
        )
        for linear in LINEARS
        if _stored_key(linear, "weight_amax") in tensors
    }


def load_kv_amax(folder: Path, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Load the amax [] of a layer's keys and of its values, written by `save_scales`."""
    with safe_open(checked_file(folder, layer_file(layer)), framework="pt") as file:
        key, value = (file.get_tensor(name).reshape(()) for name in KV_AMAX_KEYS)
    return key, value


def _stored_key(linear: str, field: str) -> str:
    return f"{linear}.{STORED_FIELDS.get(field, field)}"
