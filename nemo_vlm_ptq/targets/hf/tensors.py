"""Names and layouts of modelopt's unified Hugging Face tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nemo_vlm_ptq.targets.hf import nf4
from nemo_vlm_ptq.targets.writing.encode import EncodedEntry, EncodedLinear, KvScales
from nemo_vlm_ptq.targets.writing.packing import pack_columns, pack_rows

PACK: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int4": lambda codes: pack_rows(codes).view(torch.uint8),
    "nvfp4": pack_columns,
}


def kv_tensors(qkv: EncodedEntry, scales: KvScales) -> dict[str, torch.Tensor]:
    """Return the scales of a layer's cached keys and values by full name.

    Without v_proj both are named as those of the attention: servers take what is k_proj's for
    v_proj's, too, and accept either name.
    """
    attention = qkv.entry.hf_names[0].rsplit(".", 2)[0]
    if qkv.entry.sharding == "qk":
        return {f"{attention}.k_scale": scales.key, f"{attention}.v_scale": scales.value}
    return {
        f"{attention}.k_proj.k_scale": scales.key,
        f"{attention}.v_proj.v_scale": scales.value,
    }


def linear_tensors(linear: EncodedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors of one linear by suffix.

    pre_quant_scale and low-rank branch are in the model's dtype, all other scales in float32.
    """
    if linear.nested_absmax is not None:
        return nf4.linear_tensors(linear.codes, linear.nested_absmax, dtype)
    pack = PACK.get(linear.number_format)
    tensors = {
        "weight": linear.codes if pack is None else pack(linear.codes),
        "weight_scale": linear.scale,
    }
    float32 = {"weight_scale_2": linear.scale_2, "input_scale": linear.input_scale}
    model_dtype = {
        "pre_quant_scale": linear.pre_quant_scale,
        "svdquant_lora_a": linear.low_rank_a,
        "svdquant_lora_b": linear.low_rank_b,
    }
    tensors |= {key: value for key, value in float32.items() if value is not None}
    cast = {key: value.to(dtype) for key, value in model_dtype.items() if value is not None}
    return tensors | cast
