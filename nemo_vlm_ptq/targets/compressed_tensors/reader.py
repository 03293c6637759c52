"""Reading compressed-tensors checkpoints, linears as vLLM 0.22 computes them.

Written from the format and from what vLLM does with it, without the compressed-tensors library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.families.base import ModelFamily
from nemo_vlm_ptq.reference.checkpoint import (
    Codes,
    Dequantized,
    ReadCheckpoint,
    ReadKv,
    ReadLinear,
    kv_cache,
)
from nemo_vlm_ptq.reference.number_formats import (
    FP8_TOP,
    Rounding,
    to_fp8,
    unpack_e2m1,
    unpack_int32,
)
from nemo_vlm_ptq.targets.hf.reader import read_parts

HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # relative
SCALE = "weight_scale"
LEAST_ROW = 1 / (FP8_TOP * 512)  # scale of a row in vLLM's W4A8
BITS = {"int4": 4, "nvfp4": 4, "int8": 8}  # of a packed code
KV_SCHEME = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False}


@dataclass(frozen=True)
class Form:
    """How weights lie: their numbers, and the dtypes of the tensors of a linear."""

    number: str
    dtypes: Mapping[str, tuple[torch.dtype, ...]]


_FLOAT, _SIZES = (torch.float32,), {"weight_shape": (torch.int64,)}
_PACKED = {"weight_packed": (torch.int32,), SCALE: tuple(HALF_ULP), **_SIZES}
# (format, type, bits) of weights.
FORMS = {
    ("float-quantized", "float", 8): Form("fp8", {"weight": (torch.float8_e4m3fn,), SCALE: _FLOAT}),
    ("int-quantized", "int", 8): Form("int8", {"weight": (torch.int8,), SCALE: _FLOAT}),
    ("pack-quantized", "int", 8): Form("int8", _PACKED),
    ("pack-quantized", "int", 4): Form("int4", _PACKED),
    ("nvfp4-pack-quantized", "float", 4): Form(
        "nvfp4",
        {
            "weight_packed": (torch.uint8,),
            SCALE: (torch.float8_e4m3fn,),
            "weight_global_scale": _FLOAT,
        },
    ),
}
# (type, bits, strategy, dynamic) of inputs -> rounding, and the tensor that its scale lies in.
INPUTS: dict[tuple[Any, ...], tuple[Rounding, str | None]] = {
    ("float", 8, "tensor", False): ("fp8", "input_scale"),
    ("int", 8, "tensor", False): ("int8", "input_scale"),
    ("float", 8, "token", True): ("fp8_token", None),
    ("float", 4, "tensor_group", "local"): ("nvfp4", "input_global_scale"),
}


@dataclass(frozen=True)
class Scheme:
    """What config.json says of linears; group: inputs that share a scale, None: all of a row."""

    form: Form
    strategy: str
    group: int | None
    rounding: Rounding | None
    input_name: str | None


def read_compressed_tensors(folder: Path, family: ModelFamily) -> ReadCheckpoint:
    """An exported checkpoint: quantized linears by their scales, everything else as it lies.

    Raises:
        ProofError: files are missing or damaged, the description is not one that vLLM serves, or a
            linear has not just its tensors.
    """
    config, tensors = read_parts(folder, family)
    scheme = _scheme(config)
    ending = f".{SCALE}"
    names = sorted(name.removesuffix(ending) for name in tensors if name.endswith(ending))
    linears = {name: _take_linear(tensors, name, scheme) for name in names}
    for name in names:
        if _ignored(name, config["ignore"]):
            raise VerificationError(f"{name} is quantized and ignored")
    return ReadCheckpoint(linears, tensors, _take_kv(tensors, config, names))


def _scheme(config: Mapping[str, Any]) -> Scheme:
    (group,) = config["config_groups"].values()
    weights, inputs = group["weights"], group.get("input_activations")
    form = FORMS.get((config["format"], weights["type"], weights["num_bits"]))
    rounding, name = None, None
    if inputs is not None:
        key = tuple(inputs[part] for part in ("type", "num_bits", "strategy", "dynamic"))
        rounding, name = INPUTS.get(key, (None, None))
    known = form is not None and (inputs is None) == (rounding is None)
    if not known or config["quantization_status"] != "compressed":
        raise VerificationError(f"config.json describes linears that nobody serves: {group}")
    assert form is not None
    return Scheme(form, weights["strategy"], weights.get("group_size"), rounding, name)


def _ignored(name: str, patterns: list[str]) -> bool:
    return any(
        re.match(one[3:], name) if one.startswith("re:") else one == name for one in patterns
    )


def _take_linear(tensors: dict[str, torch.Tensor], name: str, scheme: Scheme) -> ReadLinear:
    """One linear; its tensors leave `tensors`.

    Raises:
        ProofError: a tensor is missing, or of another dtype or shape than the scheme asks for.
    """
    wanted = dict(scheme.form.dtypes)
    if scheme.input_name is not None:
        wanted[scheme.input_name] = _FLOAT
    parts = {}
    for suffix, dtypes in wanted.items():
        tensor = tensors.pop(f"{name}.{suffix}", None)
        if tensor is None:
            raise VerificationError(f"{name}.{suffix} is missing")
        if tensor.dtype not in dtypes:
            raise VerificationError(f"{name}.{suffix} is {tensor.dtype}")
        parts[suffix] = tensor
    _check_shapes(parts, scheme, name)
    given = None if scheme.input_name is None else parts[scheme.input_name].reshape(())
    if scheme.rounding == "nvfp4" and given is not None:
        given = 1 / given
    w4a8 = scheme.form.number == "int4" and scheme.rounding == "fp8_token"
    return ReadLinear(
        codes=parts,
        decode=partial(_values, scheme.form.number, w4a8),
        number=scheme.form.number,
        fp8_roundings=2 * w4a8,
        input_scale=given,
        rounding=scheme.rounding,
    )


def _values(number: str, w4a8: bool, parts: Codes) -> Dequantized:
    numbers, scale = _numbers(parts, number), parts[SCALE].float()
    if "weight_global_scale" in parts:
        scale = scale / parts["weight_global_scale"]
    weight, step = _multiply_w4a8(numbers, scale) if w4a8 else _multiply(numbers, scale)
    half_ulp = HALF_ULP.get(parts[SCALE].dtype)
    return Dequantized(weight, step, None if half_ulp is None else step * half_ulp)


def _numbers(parts: Codes, number: str) -> torch.Tensor:
    """What the codes stand for [O,K], scales apart."""
    if "weight" in parts:
        return parts["weight"].float()
    packed = parts["weight_packed"]
    return unpack_e2m1(packed) if number == "nvfp4" else unpack_int32(packed, BITS[number])


def _check_shapes(parts: Mapping[str, torch.Tensor], scheme: Scheme, name: str) -> None:
    """Of codes, and of scales: [1] for a tensor, [O,1] for channels, [O,K/group] for groups."""
    scale = parts[SCALE]
    codes = parts["weight"] if "weight" in parts else parts["weight_packed"]
    rows, columns = codes.shape
    if "weight" not in parts:
        columns = columns * 8 * codes.element_size() // BITS[scheme.form.number]
    if "weight_shape" in parts and [rows, columns] != parts["weight_shape"].tolist():
        raise VerificationError(f"{name}.weight_shape is not that of weight_packed")
    expected: tuple[int, ...] = (1,) if scheme.strategy == "tensor" else (rows, 1)
    if scheme.group is not None:
        expected = (rows, columns // scheme.group)
    if tuple(scale.shape) != expected:
        raise VerificationError(f"{name}.{SCALE} has shape {tuple(scale.shape)}, not {expected}")


def _multiply(numbers: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [O,K] and its steps."""
    step = scale
    if scale.dim() == 2 and scale.shape[1] > 1:
        step = scale.repeat_interleave(numbers.shape[1] // scale.shape[1], dim=1)
    return numbers * step, step


def _multiply_w4a8(numbers: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [O,K] and its steps as vLLM's kernel has them.

    Scales of groups become e4m3 in units of one scale a row (an eighth of them, which changes
    nothing but the smallest), and products with codes are e4m3 again.
    """
    row = (scale.amax(dim=1, keepdim=True) / FP8_TOP).clamp(min=LEAST_ROW)
    small = to_fp8(to_fp8(scale / row) / 8)
    spread = small.repeat_interleave(numbers.shape[1] // scale.shape[1], dim=1)
    return to_fp8(numbers * spread) * (row * 8), _multiply(numbers, scale)[1]


def _take_kv(
    tensors: dict[str, torch.Tensor], config: Mapping[str, Any], linears: list[str]
) -> ReadKv | None:
    """Scales of the KV cache, one of keys and one of values a layer; they leave `tensors`."""
    scheme = config.get("kv_cache_scheme")
    if scheme is None:
        return None
    if any(scheme.get(key) != value for key, value in KV_SCHEME.items()):
        raise VerificationError(f"config.json describes a KV cache that nobody serves: {scheme}")
    places = {name.rpartition(".")[0] for name in linears if ".self_attn." in name}
    found: dict[str, list[torch.Tensor]] = {"k_scale": [], "v_scale": []}
    for place in sorted(places, key=lambda name: int(name.split(".")[-2])):
        for ending, scales in found.items():
            if f"{place}.{ending}" not in tensors:
                raise VerificationError(f"{place}.{ending} is missing")
            scales.append(tensors.pop(f"{place}.{ending}"))
    return kv_cache("FP8", found["k_scale"], found["v_scale"])
