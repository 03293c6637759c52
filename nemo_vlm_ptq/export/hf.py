"""Unified Hugging Face checkpoints, as modelopt 0.47 names them: published names, packed weights.

Tower, projector, embeddings, norms and head stay as they are and are listed as excluded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nemo_vlm_ptq.export.stream import Packed, Piece
from nemo_vlm_ptq.export.trtllm import pack_rows
from nemo_vlm_ptq.formats import QuantFormat


def tensors_of(piece: Piece, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of one row by full name; plain ones and prequant scales in `dtype`.

    Parts that Hugging Face keeps in one tensor are joined again.
    """
    parts: list[Any] = list(piece.parts)
    if isinstance(parts[0], torch.Tensor):
        joined = [torch.cat(parts)] if piece.row.fused else parts
        named = zip(piece.row.hf, joined, strict=True)
        return {name: tensor.to(dtype) for name, tensor in named}
    if piece.row.fused:
        parts = [_fuse(parts)]
    tensors: dict[str, torch.Tensor] = {}
    for name, packed in zip(piece.row.hf, parts, strict=True):
        start = name.removesuffix("weight")
        tensors |= {start + key: value for key, value in _packed_tensors(packed, dtype).items()}
    return tensors


def _fuse(parts: list[Packed]) -> Packed:
    """One linear of parts that lie above each other; what is not per output they share."""
    first = parts[0]
    codes = torch.cat([part.codes.view(torch.int8) for part in parts]).view(first.codes.dtype)
    scale = torch.cat([part.scale for part in parts]) if first.scale.dim() else first.scale
    return replace(first, codes=codes, scale=scale)


def _packed_tensors(packed: Packed, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    weight = packed.codes
    if packed.scale.dim() == 2:
        weight = pack_rows(packed.codes).view(torch.uint8)
    tensors = {"weight": weight, "weight_scale": packed.scale}
    optional = {
        "weight_scale_2": packed.scale_2,
        "input_scale": packed.input_scale,
        "pre_quant_scale": None if packed.prequant is None else packed.prequant.to(dtype),
    }
    return tensors | {key: value for key, value in optional.items() if value is not None}


def quantization_config(fmt: QuantFormat, group: int, excluded: list[str]) -> dict[str, Any]:
    """The `quantization` block of hf_quant_config.json."""
    block: dict[str, Any] = {
        "quant_algo": fmt.quant_algo,
        "kv_cache_quant_algo": None,
        "exclude_modules": excluded,
    }
    if fmt.granularity == "group":
        block |= {"group_size": group, "has_zero_point": False, "pre_quant_scale": True}
    return block


def config_files(
    source_config: dict[str, Any], fmt: QuantFormat, group: int, excluded: list[str]
) -> dict[str, dict[str, Any]]:
    """File name -> JSON: the source's config with a quantization_config, and modelopt's file."""
    block = quantization_config(fmt, group, excluded)
    producer = {"name": "modelopt", "version": "0.47.0"}
    inner = {key: value for key, value in block.items() if key != "exclude_modules"}
    quantized = inner | {"ignore": excluded, "quant_method": "modelopt", "producer": producer}
    return {
        "config.json": source_config | {"quantization_config": quantized},
        "hf_quant_config.json": {"producer": producer, "quantization": block},
    }
