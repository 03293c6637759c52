"""Hugging Face checkpoints: published names, packed weights.

Named as modelopt 0.47's unified export names them, but for nf4, which is written as bitsandbytes
and transformers do. Tower, projector, embeddings, norms and head stay as they are and are listed as
excluded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from nemo_vlm_ptq.formats import KvCacheFormat, QuantFormat
from nemo_vlm_ptq.targets.hf import nf4
from nemo_vlm_ptq.targets.writing.encode import (
    EncodedEntry,
    EncodedLinear,
    KvScales,
    group_settings,
)
from nemo_vlm_ptq.targets.writing.packing import concat_rows, pack_columns, pack_rows

TensorsOf = Callable[[EncodedLinear, torch.dtype], dict[str, torch.Tensor]]

PRODUCER = {"name": "modelopt", "version": "0.47.0"}
PACK: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int4": lambda codes: pack_rows(codes).view(torch.uint8),
    "nvfp4": pack_columns,
}


def published_tensors(
    piece: EncodedEntry, dtype: torch.dtype, of_linear: TensorsOf | None = None
) -> dict[str, torch.Tensor]:
    """Tensors of one row by full name; plain ones, prequant scales and branches in `dtype`.

    Parts that Hugging Face keeps in one tensor are joined again.

    Args:
        piece: the row.
        dtype: of the model.
        of_linear: tensors of a linear by the end of their names; None: as modelopt names them.
    """
    parts: list[Any] = list(piece.parts)
    if isinstance(parts[0], torch.Tensor):
        joined = [torch.cat(parts)] if piece.row.is_fused else parts
        named = zip(piece.row.hf_names, joined, strict=True)
        return {name: tensor.to(dtype) for name, tensor in named}
    if piece.row.is_fused and parts[1:]:
        parts = [fuse_parts(parts)]
    tensors: dict[str, torch.Tensor] = {}
    for name, packed in zip(piece.row.hf_names, parts, strict=True):
        start = name.removesuffix("weight")
        own = (of_linear or _packed_tensors)(packed, dtype)
        tensors |= {start + key: value for key, value in own.items()}
    return tensors


def kv_tensors(qkv: EncodedEntry, scales: KvScales) -> dict[str, torch.Tensor]:
    """Scales of a layer's cached keys and values, beside its q, k and v, fused or not."""
    attention = qkv.row.hf_names[0].rsplit(".", 2)[0]
    return {
        f"{attention}.k_proj.k_scale": scales.key,
        f"{attention}.v_proj.v_scale": scales.value,
    }


def fuse_parts(parts: list[EncodedLinear]) -> EncodedLinear:
    """One linear of parts that lie above each other; what is not per output they share."""
    first = parts[0]
    scale, low_rank = first.scale, first.low_rank_b
    if scale.dim():
        scale = concat_rows([part.scale for part in parts])
    if low_rank is not None:
        low_rank = torch.cat([part.low_rank_b for part in parts if part.low_rank_b is not None])
    codes = concat_rows([part.codes for part in parts])
    return replace(first, codes=codes, scale=scale, low_rank_b=low_rank)


def _packed_tensors(packed: EncodedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if packed.nested_absmax is not None:
        return nf4.tensors(packed.codes, packed.nested_absmax, dtype)
    pack = PACK.get(packed.kind)
    tensors = {
        "weight": packed.codes if pack is None else pack(packed.codes),
        "weight_scale": packed.scale,
    }
    float32 = {"weight_scale_2": packed.scale_2, "input_scale": packed.input_scale}
    model = {
        "pre_quant_scale": packed.pre_quant_scale,
        "svdquant_lora_a": packed.low_rank_a,
        "svdquant_lora_b": packed.low_rank_b,
    }
    tensors |= {key: value for key, value in float32.items() if value is not None}
    return tensors | {key: value.to(dtype) for key, value in model.items() if value is not None}


def quantization_block(
    fmt: QuantFormat, group: int, excluded: list[str], kv: KvCacheFormat | None
) -> dict[str, Any]:
    """The `quantization` block of hf_quant_config.json."""
    block: dict[str, Any] = {
        "quant_algo": fmt.quant_algo,
        "kv_cache_quant_algo": None if kv is None else kv.quant_algo,
        **group_settings(fmt, group),
    }
    if fmt.low_rank:
        block["lora_rank"] = fmt.low_rank
    return block | {"exclude_modules": excluded}


def _as_compressed_tensors(block: dict[str, Any]) -> dict[str, Any]:
    """`quantization_config` of config.json: modelopt's form of it, and the block's own keys.

    Readers take the KV cache from `kv_cache_scheme`, and sizes of groups from either place.
    """
    config = {key: value for key, value in block.items() if key != "exclude_modules"}
    bits = {"FP8": 8, "NVFP4": 4, "NVFP4_SVD": 4}.get(block["quant_algo"])
    if bits is not None:
        numbers = {"dynamic": False, "num_bits": bits, "type": "float"}
        if "group_size" in block:
            numbers["group_size"] = block["group_size"]
        more = ("has_zero_point", "pre_quant_scale", "lora_rank")
        group = {
            "input_activations": numbers,
            "weights": numbers,
            **{key: block[key] for key in more if key in block},
            "targets": ["Linear"],
        }
        config["config_groups"] = {"group_0": group}
    scheme = block["kv_cache_quant_algo"]
    if scheme == "FP8":
        scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    if scheme is not None:
        config["kv_cache_scheme"] = scheme
    return config | {
        "ignore": block["exclude_modules"],
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }


def config_files(source_config: dict[str, Any], block: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """File name -> JSON: the source's config with a quantization_config, and modelopt's file."""
    return {
        "config.json": source_config | {"quantization_config": _as_compressed_tensors(block)},
        "hf_quant_config.json": {"producer": PRODUCER, "quantization": block},
    }
