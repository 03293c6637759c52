"""Read Hugging Face checkpoints: ModelOpt's unified export, and bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.families.base import ModelFamily
from nemo_vlm_ptq.reference.checkpoint import (
    ReadCheckpoint,
    ReadKvCache,
    read_kv_cache,
    read_linear,
)
from nemo_vlm_ptq.reference.files import read_files
from nemo_vlm_ptq.targets.hf.nf4_reader import pop_linears

if TYPE_CHECKING:
    from nemo_vlm_ptq.planning.plan import Plan

SUFFIXES = {
    "weight": "weight",
    "weight_scale": "scale",
    "weight_scale_2": "scale_2",
    "input_scale": "input_scale",
    "pre_quant_scale": "pre_quant_scale",
    "svdquant_lora_a": "low_rank_a",
    "svdquant_lora_b": "low_rank_b",
}
KV_SUFFIXES = ("k_proj.k_scale", "v_proj.v_scale")


def read_unified(folder: Path, family: ModelFamily) -> ReadCheckpoint:
    """Read a checkpoint written by ModelOpt's unified export or by bitsandbytes.

    Raises:
        VerificationError: a file is missing or damaged, or a tensor is missing or unexpected.
    """
    config, tensors = read_files(folder, family)
    if config["quant_method"] == "bitsandbytes":
        return ReadCheckpoint(linears=pop_linears(tensors), plain=tensors)
    path = folder / family.decoder_subfolder / "hf_quant_config.json"
    try:
        block = json.loads(path.read_text())["quantization"]
    except (OSError, ValueError, KeyError) as error:
        raise VerificationError(f"{path} cannot be read: {error}") from None
    names = sorted(n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale"))
    linears = {}
    for name in names:
        stored = {
            key: tensors.pop(f"{name}.{suffix}")
            for suffix, key in SUFFIXES.items()
            if f"{name}.{suffix}" in tensors
        }
        linears[name] = read_linear(stored, block, name)
    kv = _pop_kv_cache(tensors, block, list(linears))
    return ReadCheckpoint(linears=linears, plain=tensors, kv=kv)


def _pop_kv_cache(
    tensors: dict[str, torch.Tensor], block: Mapping[str, Any], linears: list[str]
) -> ReadKvCache | None:
    """Read the KV cache scales of all layers, and remove them from `tensors`."""
    algorithm = block["kv_cache_quant_algo"]
    if algorithm is None:
        return None
    modules = {name.rpartition(".")[0] for name in linears if ".self_attn." in name}
    scales: list[list[torch.Tensor]] = [[], []]
    for module in sorted(modules, key=lambda name: int(name.split(".")[-2])):
        for per_layer, suffix in zip(scales, KV_SUFFIXES, strict=True):
            name = f"{module}.{suffix}"
            if f"{module}.v_proj" not in linears and f"{module}.k_proj" in linears:
                name = f"{module}.{suffix.partition('.')[2]}"
            if name not in tensors:
                raise VerificationError(f"tensor {name} is missing")
            per_layer.append(tensors.pop(name))
    return read_kv_cache(algorithm, *scales)


def read(folder: Path, plan: Plan) -> ReadCheckpoint:
    """Read an export of this package."""
    return read_unified(folder, plan.family)
