"""quantization_config of a compressed-tensors checkpoint, from the library's schema classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nemo_vlm_ptq.formats import KvCacheFormat, QuantFormat

NUMBER_FORMATS: dict[str, tuple[str, int]] = {  # number format -> type and num_bits
    "fp8": ("float", 8),
    "int8": ("int", 8),
    "int4": ("int", 4),
    "nvfp4": ("float", 4),
}
# Quantization of inputs -> QuantizationArgs.
INPUT_ARGS: dict[str, dict[str, Any]] = {
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
UNUSED_ARGS = {"observer", "observer_kwargs", "zp_dtype"}  # of the library's own calibration


def quantization_config(
    fmt: QuantFormat, group_size: int, ignore: list[str], kv: KvCacheFormat | None
) -> dict[str, Any]:
    """Return the `quantization_config` of config.json.

    Args:
        fmt: the format.
        group_size: the recipe's group size.
        ignore: patterns of the modules that stay in 16 bit.
        kv: KV cache format, or None.
    """
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )

    number_type, bits = NUMBER_FORMATS[fmt.weight]
    inputs, layout = _input_format(fmt), _weight_layout(fmt)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=bits,
            type=number_type,
            strategy="tensor_group" if fmt.weight == "nvfp4" else fmt.granularity,
            group_size=fmt.group(group_size) if fmt.grouped else None,
            dynamic=False,
        ),
        input_activations=None if inputs is None else QuantizationArgs(**INPUT_ARGS[inputs]),
        format=layout,
    )
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=layout,
        quantization_status="compressed",
        ignore=ignore,
        kv_cache_scheme=None if kv is None else QuantizationArgs(**INPUT_ARGS[kv.number_format]),
    )
    excluded: Any = {
        "config_groups": {"group_0": {"weights": UNUSED_ARGS, "input_activations": UNUSED_ARGS}},
        "kv_cache_scheme": UNUSED_ARGS,
    }
    return config.model_dump(mode="json", exclude_none=True, exclude=excluded)


def ignore_patterns(shapes: Mapping[str, tuple[int, ...]], quantized: Iterable[str]) -> list[str]:
    """Return patterns of the modules that are not quantized.

    Servers rename the prefixes of modules. Each module is therefore matched by the first part of
    its path that no quantized linear has, such as `vision_tower` or `lm_head`.

    Args:
        shapes: shapes of the weights beside the decoder's linears, by name.
        quantized: names of the linears' weights.
    """
    shared = {part for name in quantized for part in name.split(".")}
    distinct = {
        next(part for part in name.split(".") if part not in shared)
        for name, shape in shapes.items()
        if len(shape) > 1
    }
    return [f"re:.*{part}.*" for part in sorted(distinct)]


def _input_format(fmt: QuantFormat) -> str | None:
    """Return the quantization of inputs; W4A8 is served with dynamic scales per token."""
    return fmt.activation if fmt.second_weight is None else "fp8_token"


def _weight_layout(fmt: QuantFormat) -> str:
    """Return the library's name of the weights' layout."""
    if fmt.weight == "nvfp4":
        return "nvfp4-pack-quantized"
    if fmt.weight == "fp8":
        return "float-quantized"
    packed = fmt.weight == "int4" or fmt.activation is None
    return "pack-quantized" if packed else "int-quantized"
