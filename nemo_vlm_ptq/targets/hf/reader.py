"""Reading Hugging Face checkpoints: the 16 bit source, modelopt's unified ones, bitsandbytes'."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.checkpoints.huggingface import SourceTensor, open_source
from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.families.base import ModelFamily
from nemo_vlm_ptq.reference.checkpoint import ReadCheckpoint, ReadKv, dequantize, kv_cache
from nemo_vlm_ptq.targets.hf.nf4_reader import take_linears

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


def read_source(places: Mapping[str, SourceTensor]) -> ReadCheckpoint:
    """All tensors of a 16 bit checkpoint under their published names."""
    with open_source(places) as reader:
        return ReadCheckpoint({}, {name: reader.whole(name) for name in places})


def read_parts(folder: Path, family: ModelFamily) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """`quantization_config` beside the decoder, and all tensors.

    Names are PART/NAME where the family keeps its parts in sub-folders.

    Raises:
        ProofError: files are missing or damaged.
    """
    try:
        text = (folder / family.decoder_subfolder / "config.json").read_text()
        config = json.loads(text)["quantization_config"]
        tensors = {}
        for part in family.subfolders:
            start = f"{part}/" if part else ""
            for path in sorted((folder / part).glob("*.safetensors")):
                tensors.update({start + name: t for name, t in load_file(path).items()})
    except Exception as error:  # safetensors raises its own types for damage of any kind
        raise VerificationError(f"{folder} cannot be read: {error}") from None
    return config, tensors


def read_unified(folder: Path, family: ModelFamily) -> ReadCheckpoint:
    """An exported checkpoint: quantized linears by their scales, everything else as it lies.

    Raises:
        ProofError: files are missing or damaged, or a linear has not just its tensors.
    """
    config, tensors = read_parts(folder, family)
    if config["quant_method"] == "bitsandbytes":
        return ReadCheckpoint(take_linears(tensors), tensors)
    try:
        path = folder / family.decoder_subfolder / "hf_quant_config.json"
        block = json.loads(path.read_text())["quantization"]
    except (OSError, ValueError, KeyError) as error:
        raise VerificationError(f"{folder} cannot be read: {error}") from None
    names = sorted(n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale"))
    linears = {}
    for name in names:
        parts = {
            key: tensors.pop(f"{name}.{suffix}")
            for suffix, key in SUFFIXES.items()
            if f"{name}.{suffix}" in tensors
        }
        linears[name] = dequantize(parts, block, name)
    return ReadCheckpoint(linears, tensors, _take_kv(tensors, block, list(linears)))


def _take_kv(
    tensors: dict[str, torch.Tensor], block: Mapping[str, Any], linears: list[str]
) -> ReadKv | None:
    """Scales of the KV cache, one of keys and one of values a layer; they leave `tensors`."""
    algorithm = block["kv_cache_quant_algo"]
    if algorithm is None:
        return None
    places = {name.rpartition(".")[0] for name in linears if ".self_attn." in name}
    layers = sorted(places, key=lambda name: int(name.split(".")[-2]))
    found: list[list[torch.Tensor]] = [[], []]
    for layer in layers:
        for scales, suffix in zip(found, KV_SUFFIXES, strict=True):
            name = f"{layer}.{suffix}"
            if name not in tensors:
                raise VerificationError(f"{name} is missing")
            scales.append(tensors.pop(name))
    return kv_cache(algorithm, *found)
