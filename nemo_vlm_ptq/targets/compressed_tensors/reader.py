"""Read compressed-tensors checkpoints and dequantize weights as vLLM 0.22 does.

Written from the format and from vLLM's kernels, without the compressed-tensors library that the
writer uses.

Legend: O output features, K input features, G groups of K.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.families.base import ModelFamily
from nemo_vlm_ptq.reference.checkpoint import (
    Dequantized,
    ReadCheckpoint,
    ReadKvCache,
    ReadLinear,
    StoredTensors,
    read_kv_cache,
)
from nemo_vlm_ptq.reference.files import read_files
from nemo_vlm_ptq.reference.number_formats import (
    FP8_HALF_SUBNORMAL,
    FP8_MAX,
    NVFP4_BLOCK,
    ActivationFormat,
    nvfp4_underflow,
    round_to_fp8,
    unpack_e2m1,
    unpack_int32,
)

if TYPE_CHECKING:
    from nemo_vlm_ptq.planning.plan import Plan

HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # relative
SCALE = "weight_scale"
MIN_CHANNEL_SCALE = 1 / (FP8_MAX * 512)  # in vLLM's W4A8 kernel
CODE_BITS = {"int4": 4, "nvfp4": 4, "int8": 8}  # of packed codes
KV_CACHE_SCHEME = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False}


@dataclass(frozen=True)
class WeightLayout:
    """Number format of the weights, and the dtypes that each tensor of a linear may have."""

    number_format: str
    dtypes: Mapping[str, tuple[torch.dtype, ...]]


_FLOAT, _SHAPE = (torch.float32,), {"weight_shape": (torch.int64,)}
_PACKED = {"weight_packed": (torch.int32,), SCALE: tuple(HALF_ULP), **_SHAPE}
# (format, type, num_bits) of the weights -> layout.
WEIGHT_LAYOUTS = {
    ("float-quantized", "float", 8): WeightLayout(
        number_format="fp8", dtypes={"weight": (torch.float8_e4m3fn,), SCALE: _FLOAT}
    ),
    ("int-quantized", "int", 8): WeightLayout(
        number_format="int8", dtypes={"weight": (torch.int8,), SCALE: _FLOAT}
    ),
    ("pack-quantized", "int", 8): WeightLayout(number_format="int8", dtypes=_PACKED),
    ("pack-quantized", "int", 4): WeightLayout(number_format="int4", dtypes=_PACKED),
    ("nvfp4-pack-quantized", "float", 4): WeightLayout(
        number_format="nvfp4",
        dtypes={
            "weight_packed": (torch.uint8,),
            SCALE: (torch.float8_e4m3fn,),
            "weight_global_scale": _FLOAT,
        },
    ),
}
# (type, num_bits, strategy, dynamic) of the inputs -> format and name of the scale tensor.
INPUT_FORMATS: dict[tuple[Any, ...], tuple[ActivationFormat, str | None]] = {
    ("float", 8, "tensor", False): ("fp8", "input_scale"),
    ("int", 8, "tensor", False): ("int8", "input_scale"),
    ("float", 8, "token", True): ("fp8_token", None),
    ("float", 4, "tensor_group", "local"): ("nvfp4", "input_global_scale"),
}


@dataclass(frozen=True)
class Scheme:
    """Quantization scheme of all linears; group_size is None without groups."""

    weights: WeightLayout
    strategy: str
    group_size: int | None
    input_format: ActivationFormat | None
    input_scale_name: str | None


def read_compressed_tensors(folder: Path, family: ModelFamily) -> ReadCheckpoint:
    """Read a compressed-tensors checkpoint.

    Raises:
        VerificationError: a file is missing or damaged, vLLM does not support the scheme, or a
            tensor of a linear is missing or of another dtype or shape.
    """
    config, tensors = read_files(folder, family)
    scheme = _read_scheme(config)
    suffix = f".{SCALE}"
    names = sorted(name.removesuffix(suffix) for name in tensors if name.endswith(suffix))
    linears = {name: _pop_linear(tensors, name, scheme) for name in names}
    for name in names:
        if _is_ignored(name, config["ignore"]):
            raise VerificationError(f"{name} is quantized, but config.json ignores it")
    kv = _pop_kv_cache(tensors, config, names)
    return ReadCheckpoint(linears=linears, plain=tensors, kv=kv)


def _read_scheme(config: Mapping[str, Any]) -> Scheme:
    (group,) = config["config_groups"].values()
    weights, inputs = group["weights"], group.get("input_activations")
    layout = WEIGHT_LAYOUTS.get((config["format"], weights["type"], weights["num_bits"]))
    input_format, scale_name = None, None
    if inputs is not None:
        key = tuple(inputs[field] for field in ("type", "num_bits", "strategy", "dynamic"))
        input_format, scale_name = INPUT_FORMATS.get(key, (None, None))
    supported = layout is not None and (inputs is None) == (input_format is None)
    if not supported or config["quantization_status"] != "compressed":
        raise VerificationError(f"config.json: vLLM does not support the scheme {group}")
    assert layout is not None
    return Scheme(
        weights=layout,
        strategy=weights["strategy"],
        group_size=weights.get("group_size"),
        input_format=input_format,
        input_scale_name=scale_name,
    )


def _is_ignored(name: str, patterns: list[str]) -> bool:
    return any(
        re.match(pattern[3:], name) if pattern.startswith("re:") else pattern == name
        for pattern in patterns
    )


def _pop_linear(tensors: dict[str, torch.Tensor], name: str, scheme: Scheme) -> ReadLinear:
    """Read one linear, and remove its tensors from `tensors`.

    Raises:
        VerificationError: a tensor is missing, or of a dtype or shape that the scheme does not
            allow.
    """
    expected = dict(scheme.weights.dtypes)
    if scheme.input_scale_name is not None:
        expected[scheme.input_scale_name] = _FLOAT
    stored = {}
    for suffix, dtypes in expected.items():
        tensor = tensors.pop(f"{name}.{suffix}", None)
        if tensor is None:
            raise VerificationError(f"tensor {name}.{suffix} is missing")
        if tensor.dtype not in dtypes:
            allowed = " or ".join(map(str, dtypes))
            raise VerificationError(f"tensor {name}.{suffix} must be {allowed}, got {tensor.dtype}")
        stored[suffix] = tensor
    _check_shapes(stored, scheme, name)
    input_scale = None
    if scheme.input_scale_name is not None:
        input_scale = stored[scheme.input_scale_name].reshape(())
    if scheme.input_format == "nvfp4" and input_scale is not None:
        input_scale = 1 / input_scale
    number_format = scheme.weights.number_format
    w4a8 = number_format == "int4" and scheme.input_format == "fp8_token"
    return ReadLinear(
        stored=stored,
        decode=partial(_decode, number_format, w4a8),
        number_format=number_format,
        fp8_roundings=2 * w4a8,
        input_scale=input_scale,
        input_format=scheme.input_format,
    )


def _decode(number_format: str, w4a8: bool, stored: StoredTensors) -> Dequantized:
    codes_OK, scale, underflow = _unpack_codes(stored, number_format), stored[SCALE].float(), None
    if "weight_global_scale" in stored:
        small = nvfp4_underflow(scale, 1 / stored["weight_global_scale"])
        underflow = small.repeat_interleave(NVFP4_BLOCK, dim=1)
        scale = scale / stored["weight_global_scale"]
    weight_OK, step = _dequantize(codes_OK, scale)
    if w4a8:
        weight_OK, underflow = _dequantize_w4a8(codes_OK, scale)
    half_ulp = HALF_ULP.get(stored[SCALE].dtype)
    step_error = None if half_ulp is None else step * half_ulp
    return Dequantized(weight=weight_OK, step=step, step_error=step_error, underflow=underflow)


def _unpack_codes(stored: StoredTensors, number_format: str) -> torch.Tensor:
    """Return the codes [O,K] as float32, without scales."""
    if "weight" in stored:
        return stored["weight"].float()
    packed = stored["weight_packed"]
    if number_format == "nvfp4":
        return unpack_e2m1(packed)
    return unpack_int32(packed, CODE_BITS[number_format])


def _check_shapes(stored: StoredTensors, scheme: Scheme, name: str) -> None:
    """Check the scale's shape: [1] per tensor, [O,1] per channel, [O,G] per group."""
    scale = stored[SCALE]
    codes = stored["weight"] if "weight" in stored else stored["weight_packed"]
    rows, columns = codes.shape
    if "weight" not in stored:
        columns = columns * 8 * codes.element_size() // CODE_BITS[scheme.weights.number_format]
    if "weight_shape" in stored and [rows, columns] != stored["weight_shape"].tolist():
        raise VerificationError(
            f"tensor {name}.weight_shape must hold [{rows}, {columns}], the shape of the codes; "
            f"got {stored['weight_shape'].tolist()}"
        )
    expected: tuple[int, ...] = (1,) if scheme.strategy == "tensor" else (rows, 1)
    if scheme.group_size is not None:
        expected = (rows, columns // scheme.group_size)
    if tuple(scale.shape) != expected:
        raise VerificationError(
            f"tensor {name}.{SCALE} must have shape {expected}, got {tuple(scale.shape)}"
        )


def _dequantize(codes_OK: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight [O,K] and its step."""
    step = scale
    if scale.dim() == 2 and scale.shape[1] > 1:
        step = scale.repeat_interleave(codes_OK.shape[1] // scale.shape[1], dim=1)
    return codes_OK * step, step


def _dequantize_w4a8(
    codes_OK: torch.Tensor, scale_OG: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight [O,K] as vLLM's W4A8 kernel computes it, and its error by underflow [O,1].

    The kernel rounds group scales to e4m3 in units of one scale per output channel, and the product
    of code and group scale to e4m3 again. It stores an eighth of the group scale, which is exact
    except for subnormal values.
    """
    channel_O1 = (scale_OG.amax(dim=1, keepdim=True) / FP8_MAX).clamp(min=MIN_CHANNEL_SCALE)
    group_OG = round_to_fp8(round_to_fp8(scale_OG / channel_O1) / 8)
    group_OK = group_OG.repeat_interleave(codes_OK.shape[1] // scale_OG.shape[1], dim=1)
    weight_OK = round_to_fp8(codes_OK * group_OK) * (channel_O1 * 8)
    # Codes up to 8 times the scale in units of the channel's, then of 8 times it; then the value.
    underflow_O1 = (8 * (1 + 8) + 8) * FP8_HALF_SUBNORMAL * channel_O1
    return weight_OK, underflow_O1


def _pop_kv_cache(
    tensors: dict[str, torch.Tensor], config: Mapping[str, Any], linears: list[str]
) -> ReadKvCache | None:
    """Read the KV cache scales of all layers, and remove them from `tensors`."""
    scheme = config.get("kv_cache_scheme")
    if scheme is None:
        return None
    if any(scheme.get(key) != value for key, value in KV_CACHE_SCHEME.items()):
        raise VerificationError(
            f"config.json: kv_cache_scheme must be {KV_CACHE_SCHEME}, got {scheme}"
        )
    modules = {name.rpartition(".")[0] for name in linears if ".self_attn." in name}
    scales: dict[str, list[torch.Tensor]] = {"k_scale": [], "v_scale": []}
    for module in sorted(modules, key=lambda name: int(name.split(".")[-2])):
        for suffix, per_layer in scales.items():
            if f"{module}.{suffix}" not in tensors:
                raise VerificationError(f"tensor {module}.{suffix} is missing")
            per_layer.append(tensors.pop(f"{module}.{suffix}"))
    return read_kv_cache("FP8", scales["k_scale"], scales["v_scale"])


def read(folder: Path, plan: Plan) -> ReadCheckpoint:
    """Read an export of this package."""
    return read_compressed_tensors(folder, plan.family)
