"""Data model of a checkpoint that was read back, common to the readers of all targets.

The readers verify what the writers wrote, so they share no arithmetic with them: this package
imports neither `numerics` nor `targets.writing`. The cost is a second implementation of number
formats and dequantization.

Legend: O output features, K input features, R rank of the low-rank branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.reference.number_formats import (
    FP8_HALF_SUBNORMAL,
    ActivationFormat,
    nvfp4_underflow,
    round_to_fp8,
    unpack_e2m1,
    unpack_int4,
)
from nemo_vlm_ptq.utils.pinned_memory import to_device

CPU = torch.device("cpu")
StoredTensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Dequantized:
    """Dequantized weight of one linear and its quantization step.

    weight: [O,K] float32.
    step: factor between a code and its value, broadcastable to [O,K].
    step_error: upper bound of the error of `step` if the checkpoint stores it rounded (nf4, packed
        integers), else None.
    underflow: upper bound of the error [], or broadcastable to [O,K], that values and scales below
        the normal numbers of fp8 add to the half step (nvfp4, W4A8), else None.
    """

    weight: torch.Tensor
    step: torch.Tensor
    step_error: torch.Tensor | None = None
    underflow: torch.Tensor | None = None


@dataclass(frozen=True)
class ReadLinear:
    """Quantized linear as its consumer computes it: y = Q(x * s) W^T + (x * s) A^T B^T.

    stored: tensors that the weight is decoded from, as stored in the checkpoint.
    decode: function from `stored` to the weight W.
    number_format: of the codes: fp8, int8, int4, nvfp4 or nf4.
    fp8_roundings: number of additional fp8 roundings of value or scale (W4A8).
    pre_quant_scale: s [K].
    low_rank: A [R,K] and B [O,R], applied to the scaled input before quantization.
    input_scale: static scale [] of the input.
    input_format: format Q of the input; None for 16 bit.
    """

    stored: StoredTensors
    decode: Callable[[StoredTensors], Dequantized]
    number_format: str
    fp8_roundings: int = 0
    pre_quant_scale: torch.Tensor | None = None
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None
    input_scale: torch.Tensor | None = None
    input_format: ActivationFormat | None = None

    def dequantize(self, device: torch.device = CPU) -> Dequantized:
        """Dequantize the weight on a device.

        The result is not cached: weight and step take up to 24 times the memory of the codes.
        """
        return self.decode(
            {name: to_device(tensor, device) for name, tensor in self.stored.items()}
        )


@dataclass(frozen=True)
class ReadKvCache:
    """Number format of a quantized KV cache, and its scales [layers with attention] float32."""

    number_format: ActivationFormat
    key_scale: torch.Tensor
    value_scale: torch.Tensor


@dataclass(frozen=True)
class ReadCheckpoint:
    """Contents of a checkpoint.

    linears: quantized linears by Hugging Face name without `.weight`.
    plain: all other tensors by full Hugging Face name.
    kv: scales of the KV cache; None for 16 bit.
    """

    linears: dict[str, ReadLinear]
    plain: dict[str, torch.Tensor]
    kv: ReadKvCache | None = None


@dataclass(frozen=True)
class Algorithm:
    """Meaning of a `quant_algo`; extra_tensors are required besides weight and scale."""

    number_format: str
    input_format: ActivationFormat | None
    extra_tensors: tuple[str, ...] = ()


ALGORITHMS = {
    "FP8": Algorithm(number_format="fp8", input_format="fp8", extra_tensors=("input_scale",)),
    "FP8_PER_CHANNEL_PER_TOKEN": Algorithm(number_format="fp8", input_format="fp8_token"),
    "W8A8_SQ_PER_CHANNEL": Algorithm(
        number_format="int8", input_format="int8", extra_tensors=("input_scale", "pre_quant_scale")
    ),
    "W8A16": Algorithm(number_format="int8", input_format=None),
    "W4A16_AWQ": Algorithm(
        number_format="int4", input_format=None, extra_tensors=("pre_quant_scale",)
    ),
    "W4A8_AWQ": Algorithm(
        number_format="int4",
        input_format="fp8",
        extra_tensors=("input_scale", "pre_quant_scale", "scale_2"),
    ),
    "NVFP4": Algorithm(
        number_format="nvfp4", input_format="nvfp4", extra_tensors=("input_scale", "scale_2")
    ),
    "NVFP4_AWQ": Algorithm(
        number_format="nvfp4",
        input_format="nvfp4",
        extra_tensors=("input_scale", "pre_quant_scale", "scale_2"),
    ),
    "NVFP4_SVD": Algorithm(
        number_format="nvfp4",
        input_format="nvfp4",
        extra_tensors=("input_scale", "low_rank_a", "low_rank_b", "pre_quant_scale", "scale_2"),
    ),
}
KV_CACHE_FORMATS: dict[str, ActivationFormat] = {"FP8": "fp8", "INT8": "int8", "NVFP4": "nvfp4"}
UNPACK: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int4": unpack_int4,
    "nvfp4": unpack_e2m1,
}
WEIGHT_DTYPES = {"fp8": (torch.float8_e4m3fn,), "int8": (torch.int8,)}
PACKED_DTYPES = (torch.int8, torch.uint8)


def read_kv_cache(
    algorithm: str, key_scales: Sequence[torch.Tensor], value_scales: Sequence[torch.Tensor]
) -> ReadKvCache:
    """Collect the KV cache scales of all layers, given in layer order.

    Raises:
        VerificationError: the algorithm is unknown, or a scale is not one positive float32 number.
    """
    if algorithm not in KV_CACHE_FORMATS:
        supported = ", ".join(KV_CACHE_FORMATS)
        raise VerificationError(
            f"unknown kv_cache_quant_algo {algorithm!r}; supported: {supported}"
        )
    for name, scales in (("key", key_scales), ("value", value_scales)):
        for layer, scale in enumerate(scales):
            if scale.dtype != torch.float32 or scale.numel() != 1 or not float(scale) > 0:
                raise VerificationError(
                    f"layer {layer}: {name} scale must be one positive float32 number, got {scale}"
                )
    return ReadKvCache(
        number_format=KV_CACHE_FORMATS[algorithm],
        key_scale=torch.stack([scale.reshape(()) for scale in key_scales]),
        value_scale=torch.stack([scale.reshape(()) for scale in value_scales]),
    )


def read_linear(
    tensors: Mapping[str, torch.Tensor], block: Mapping[str, Any], name: str
) -> ReadLinear:
    """Build a linear from its stored tensors.

    Args:
        tensors: weight, scale and the extra tensors of the algorithm.
        block: `quantization` block of a config file.
        name: of the linear, for messages.

    Raises:
        VerificationError: the algorithm is unknown, or a tensor is missing, unexpected or of
            another dtype.
    """
    algorithm = ALGORITHMS.get(block["quant_algo"])
    if algorithm is None:
        supported = ", ".join(ALGORITHMS)
        raise VerificationError(
            f"{name}: unknown quant_algo {block['quant_algo']!r}; supported: {supported}"
        )
    expected = {"weight", "scale", *algorithm.extra_tensors}
    if block.get("pre_quant_scale") is False:
        expected.discard("pre_quant_scale")
    if missing := sorted(expected - set(tensors)):
        raise VerificationError(f"{name}: tensor {missing[0]} is missing")
    if unexpected := sorted(set(tensors) - expected):
        raise VerificationError(
            f"{name}: tensor {unexpected[0]} is not part of {block['quant_algo']}"
        )
    _check_dtypes(tensors, algorithm.number_format, name)
    two_level = algorithm.number_format == "int4" and "scale_2" in tensors
    pre_quant_scale, input_scale = (tensors.get("pre_quant_scale"), tensors.get("input_scale"))
    low_rank = None
    if "low_rank_a" in tensors:
        low_rank = (tensors["low_rank_a"].float(), tensors["low_rank_b"].float())
    return ReadLinear(
        stored=tensors,
        decode=partial(_decode, algorithm.number_format, two_level),
        number_format=algorithm.number_format,
        fp8_roundings=int(two_level),
        pre_quant_scale=None if pre_quant_scale is None else pre_quant_scale.float(),
        low_rank=low_rank,
        input_scale=None if input_scale is None else input_scale.reshape(()),
        input_format=algorithm.input_format,
    )


def _decode(number_format: str, two_level: bool, tensors: StoredTensors) -> Dequantized:
    """Decode a weight; `two_level` rounds it to fp8 in units of scale_2 as well (W4A8)."""
    unpack = UNPACK.get(number_format)
    codes_OK = tensors["weight"].float() if unpack is None else unpack(tensors["weight"])
    step, underflow = _expand_scale(tensors["scale"].float(), codes_OK.shape[1]), None
    if "scale_2" in tensors and not two_level:
        underflow = nvfp4_underflow(step, tensors["scale_2"])
        step = step * tensors["scale_2"]
    weight_OK = codes_OK * step
    if two_level:
        weight_OK = round_to_fp8(weight_OK / tensors["scale_2"]) * tensors["scale_2"]
        underflow = FP8_HALF_SUBNORMAL * tensors["scale_2"]
    return Dequantized(weight=weight_OK, step=step, underflow=underflow)


def _expand_scale(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """Expand a scale [], [1], [O] or [O,groups] so that it broadcasts to a weight [O,K]."""
    if scale.dim() == 2:
        return scale.repeat_interleave(columns // scale.shape[1], dim=1)
    return scale[:, None] if scale.numel() > 1 else scale


def _check_dtypes(tensors: Mapping[str, torch.Tensor], number_format: str, linear: str) -> None:
    expected = {"scale": torch.float8_e4m3fn if number_format == "nvfp4" else torch.float32}
    expected |= dict.fromkeys(("scale_2", "input_scale"), torch.float32)
    for name, dtype in expected.items():
        if name in tensors and tensors[name].dtype != dtype:
            raise VerificationError(
                f"{linear}: tensor {name} must be {dtype}, got {tensors[name].dtype}"
            )
    dtypes = WEIGHT_DTYPES.get(number_format, PACKED_DTYPES)
    if tensors["weight"].dtype not in dtypes:
        supported = " or ".join(map(str, dtypes))
        raise VerificationError(
            f"{linear}: tensor weight must be {supported}, got {tensors['weight'].dtype}"
        )
