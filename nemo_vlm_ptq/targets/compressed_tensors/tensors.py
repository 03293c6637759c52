"""Names and layouts of compressed-tensors' tensors; the library's function packs integers."""

from __future__ import annotations

import torch

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.targets.compressed_tensors.config import NUMBER_FORMATS
from nemo_vlm_ptq.targets.writing.encode import EncodedEntry, EncodedLinear, KvScales
from nemo_vlm_ptq.targets.writing.packing import pack_columns


def kv_tensors(qkv: EncodedEntry, scales: KvScales) -> dict[str, torch.Tensor]:
    """Return the scales [1] of a layer's cached keys and values by full name."""
    attention = qkv.entry.hf_names[0].rsplit(".", 2)[0]
    return {
        f"{attention}.k_scale": scales.key.reshape(1),
        f"{attention}.v_scale": scales.value.reshape(1),
    }


def linear_tensors(linear: EncodedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors of one linear by suffix.

    Scales are [O,1] per channel, [O,G] per group and [1] per tensor; those of packed integers are
    in the model's dtype.
    """
    assert linear.pre_quant_scale is None, "pre_quant_scales are folded before"
    scale = linear.scale.reshape(-1, 1) if linear.scale.dim() < 2 else linear.scale
    if linear.number_format == "nvfp4":
        assert linear.scale_2 is not None and linear.input_scale is not None
        return {
            "weight_packed": pack_columns(linear.codes),
            "weight_scale": scale,
            "weight_global_scale": 1 / linear.scale_2.reshape(1),
            "input_global_scale": 1 / linear.input_scale.reshape(1),
        }
    weight_only_int8 = linear.number_format == "int8" and linear.input_scale is None
    if linear.number_format == "int4" or weight_only_int8:
        return _packed_integers(linear, scale.to(dtype))
    tensors = {"weight": linear.codes, "weight_scale": scale if scale.numel() > 1 else scale[0]}
    if linear.input_scale is not None:
        tensors["input_scale"] = linear.input_scale.reshape(1)
    return tensors


def _packed_integers(linear: EncodedLinear, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pack eight or four integers per int32, in the library's order.

    Raises:
        UserError: a scale underflows or overflows the model's dtype.
    """
    from compressed_tensors.compressors import pack_to_int32

    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise UserError(f"weight scales do not fit into {scale.dtype}; set export.dtype=bfloat16")
    return {
        "weight_packed": pack_to_int32(linear.codes, NUMBER_FORMATS[linear.number_format][1]),
        "weight_scale": scale,
        "weight_shape": torch.tensor(linear.codes.shape),
    }
