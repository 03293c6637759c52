"""compressed-tensors checkpoints: published names, as vLLM and transformers read them.

The description in config.json is made of the library's own schema classes, and integers are packed
by its own function. Scales in front of linears have no place here: they are folded first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import KvCacheFormat, QuantFormat
from nemo_vlm_ptq.targets.hf import tensors as hf
from nemo_vlm_ptq.targets.writing.encode import EncodedEntry, EncodedLinear, KvScales
from nemo_vlm_ptq.targets.writing.packing import pack_columns

NUMBERS: dict[str, tuple[str, int]] = {
    "fp8": ("float", 8),
    "int8": ("int", 8),
    "int4": ("int", 4),
    "nvfp4": ("float", 4),
}
# Rounding of inputs -> how it is described.
INPUTS: dict[str, dict[str, Any]] = {
    "fp8": {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False},
    "int8": {"type": "int", "num_bits": 8, "strategy": "tensor", "dynamic": False},
    "fp8_token": {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True},
    "nvfp4": {
        "type": "float",
        "num_bits": 4,
        "strategy": "tensor_group",
        "group_size": 16,
        "dynamic": "local",
    },
}


def input_rounding(fmt: QuantFormat) -> str | None:
    """How inputs are rounded: W4A8 has no static scale here, each token brings its own."""
    return fmt.activation if fmt.second_weight is None else "fp8_token"


def _form(fmt: QuantFormat) -> str:
    """The library's name of how weights lie."""
    if fmt.weight == "nvfp4":
        return "nvfp4-pack-quantized"
    if fmt.weight == "fp8":
        return "float-quantized"
    packed = fmt.weight == "int4" or fmt.activation is None
    return "pack-quantized" if packed else "int-quantized"


def published_tensors(piece: EncodedEntry, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of one row by full name; plain ones, and scales of packed integers, in `dtype`."""
    return hf.published_tensors(piece, dtype, _packed_tensors)


def kv_tensors(qkv: EncodedEntry, scales: KvScales) -> dict[str, torch.Tensor]:
    """Scales [1] of a layer's cached keys and values."""
    attention = qkv.row.hf_names[0].rsplit(".", 2)[0]
    return {
        f"{attention}.k_scale": scales.key.reshape(1),
        f"{attention}.v_scale": scales.value.reshape(1),
    }


def _packed_tensors(packed: EncodedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of one linear; scales of channels are [O,1], single ones [1]."""
    assert packed.pre_quant_scale is None, "scales in front of linears are folded before"
    scale = packed.scale.reshape(-1, 1) if packed.scale.dim() < 2 else packed.scale
    if packed.kind == "nvfp4":
        assert packed.scale_2 is not None and packed.input_scale is not None
        return {
            "weight_packed": pack_columns(packed.codes),
            "weight_scale": scale,
            "weight_global_scale": 1 / packed.scale_2.reshape(1),
            "input_global_scale": 1 / packed.input_scale.reshape(1),
        }
    if packed.kind == "int4" or (packed.kind == "int8" and packed.input_scale is None):
        return _packed_integers(packed, scale.to(dtype))
    tensors = {"weight": packed.codes, "weight_scale": scale if scale.numel() > 1 else scale[0]}
    if packed.input_scale is not None:
        tensors["input_scale"] = packed.input_scale.reshape(1)
    return tensors


def _packed_integers(packed: EncodedLinear, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Integers eight or four to an int32, in the library's order.

    Raises:
        UserError: a scale is too small or too large for the dtype.
    """
    from compressed_tensors.compressors import pack_to_int32

    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise UserError(
            f"scales of weights do not fit into {scale.dtype}; this works: export.dtype=bfloat16"
        )
    return {
        "weight_packed": pack_to_int32(packed.codes, NUMBERS[packed.kind][1]),
        "weight_scale": scale,
        "weight_shape": torch.tensor(packed.codes.shape),
    }


def quantization_config(
    fmt: QuantFormat, group: int, ignore: list[str], kv: KvCacheFormat | None
) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        fmt: the format.
        group: the recipe's group size.
        ignore: patterns of the modules that stay in 16 bit.
        kv: row of the KV cache, or None.
    """
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )

    kind, bits = NUMBERS[fmt.weight]
    strategy = "tensor_group" if fmt.weight == "nvfp4" else fmt.granularity
    size = fmt.group(group) if fmt.grouped else None
    inputs, form = input_rounding(fmt), _form(fmt)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=bits, type=kind, strategy=strategy, group_size=size, dynamic=False
        ),
        input_activations=None if inputs is None else QuantizationArgs(**INPUTS[inputs]),
        format=form,
    )
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=form,
        quantization_status="compressed",
        ignore=ignore,
        kv_cache_scheme=None if kv is None else QuantizationArgs(**INPUTS[kv.kind]),
    )
    unused = {"observer", "observer_kwargs", "zp_dtype"}  # of the library's own calibration
    left_out: Any = {
        "config_groups": {"group_0": {"weights": unused, "input_activations": unused}},
        "kv_cache_scheme": unused,
    }
    return config.model_dump(mode="json", exclude_none=True, exclude=left_out)


def ignore_patterns(shapes: Mapping[str, tuple[int, ...]], quantized: Iterable[str]) -> list[str]:
    """Patterns of the modules beside the quantized linears.

    Readers rename what stands around a module; so each is told by the first part of its path that
    no quantized linear has: `vision_tower`, `lm_head`.

    Args:
        shapes: of the weights beside the decoder's linears, by name.
        quantized: names of the linears' weights.
    """
    inside = {part for name in quantized for part in name.split(".")}
    apart = {
        next(part for part in name.split(".") if part not in inside)
        for name, shape in shapes.items()
        if len(shape) > 1
    }
    return [f"re:.*{part}.*" for part in sorted(apart)]
