"""What a reader makes of a written checkpoint, whoever wrote it and in whatever form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.reference.number_formats import Rounding, to_fp8, unpack_e2m1, unpack_int4
from nemo_vlm_ptq.utils.pinned_memory import to_device

CPU = torch.device("cpu")
Codes = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Dequantized:
    """What the codes of a linear stand for.

    weight [O,K] float32, dequantized; step: what multiplies a code, in a shape that spreads to
    [O,K]; step_error: how far the step may be off because it was rounded itself (nf4, packed
    integers), or None.
    """

    weight: torch.Tensor
    step: torch.Tensor
    step_error: torch.Tensor | None = None


@dataclass(frozen=True)
class ReadLinear:
    """A quantized linear as its consumer computes it: y = Q(x * prequant) W^T + branch.

    codes: tensors as they lie in files, and whatever else W is made of; decode: makes it; number:
    kind of a code (fp8, int8, int4, nvfp4, nf4); fp8_roundings: how often step or value was rounded
    once more, to fp8 (W4A8); prequant [K], low_rank (a [r,K], b [O,r]) which x * prequant passes
    unrounded, input_scale [] and the rounding of inputs, or None.
    """

    codes: Codes
    decode: Callable[[Codes], Dequantized]
    number: str
    fp8_roundings: int = 0
    pre_quant_scale: torch.Tensor | None = None
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None
    input_scale: torch.Tensor | None = None
    rounding: Rounding | None = None

    def values(self, device: torch.device = CPU) -> Dequantized:
        """W on a device; made each time anew, since with its steps it is up to 24 times as large as
        the codes."""
        return self.decode({name: to_device(tensor, device) for name, tensor in self.codes.items()})


@dataclass(frozen=True)
class ReadKv:
    """A rounded KV cache: scales [layers] float32 of keys and of values."""

    rounding: Rounding
    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class ReadCheckpoint:
    """Linears by Hugging Face name without `.weight`, all other tensors by full name."""

    linears: dict[str, ReadLinear]
    plain: dict[str, torch.Tensor]
    kv: ReadKv | None = None


@dataclass(frozen=True)
class Algorithm:
    """What a quant_algo stands for; `tensors` are there besides weight and scale."""

    number: str
    rounding: Rounding | None
    tensors: tuple[str, ...] = ()


ALGORITHMS = {
    "FP8": Algorithm("fp8", "fp8", ("input_scale",)),
    "FP8_PER_CHANNEL_PER_TOKEN": Algorithm("fp8", "fp8_token"),
    "W8A8_SQ_PER_CHANNEL": Algorithm("int8", "int8", ("input_scale", "pre_quant_scale")),
    "W8A16": Algorithm("int8", None),
    "W4A16_AWQ": Algorithm("int4", None, ("pre_quant_scale",)),
    "W4A8_AWQ": Algorithm("int4", "fp8", ("input_scale", "pre_quant_scale", "scale_2")),
    "NVFP4": Algorithm("nvfp4", "nvfp4", ("input_scale", "scale_2")),
    "NVFP4_AWQ": Algorithm("nvfp4", "nvfp4", ("input_scale", "pre_quant_scale", "scale_2")),
    "NVFP4_SVD": Algorithm(
        "nvfp4",
        "nvfp4",
        ("input_scale", "low_rank_a", "low_rank_b", "pre_quant_scale", "scale_2"),
    ),
}
KV_ALGORITHMS: dict[str, Rounding] = {"FP8": "fp8", "INT8": "int8", "NVFP4": "nvfp4"}
UNPACK: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int4": unpack_int4,
    "nvfp4": unpack_e2m1,
}
WEIGHT_DTYPES = {"fp8": (torch.float8_e4m3fn,), "int8": (torch.int8,)}
BYTES = (torch.int8, torch.uint8)


def kv_cache(
    algorithm: str, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> ReadKv:
    """A rounded KV cache from the scales of its layers, in order.

    Raises:
        ProofError: unknown algorithm, or scales that are not positive float32 numbers.
    """
    if algorithm not in KV_ALGORITHMS:
        raise VerificationError(f"kv_cache_quant_algo {algorithm!r} is not known")
    stacked = []
    for what, scales in (("keys", keys), ("values", values)):
        for layer, scale in enumerate(scales):
            if scale.dtype != torch.float32 or scale.numel() != 1 or not float(scale) > 0:
                raise VerificationError(f"layer {layer}: the scale of {what} is {scale}")
        stacked.append(torch.stack([scale.reshape(()) for scale in scales]))
    return ReadKv(KV_ALGORITHMS[algorithm], *stacked)


def dequantize(
    tensors: Mapping[str, torch.Tensor], block: Mapping[str, Any], where: str
) -> ReadLinear:
    """A linear from its tensors.

    Args:
        tensors: weight, scale and what the algorithm has besides.
        block: the quantization block of a config file.
        where: the linear, for messages.

    Raises:
        ProofError: unknown algorithm, or not just the tensors it needs, in their dtypes.
    """
    algorithm = ALGORITHMS.get(block["quant_algo"])
    if algorithm is None:
        raise VerificationError(f"{where}: quant_algo {block['quant_algo']!r} is not known")
    needed = {"weight", "scale", *algorithm.tensors}
    if block.get("pre_quant_scale") is False:
        needed.discard("pre_quant_scale")
    if missing := sorted(needed - set(tensors)):
        raise VerificationError(f"{where}: {missing[0]} is missing")
    if extra := sorted(set(tensors) - needed):
        raise VerificationError(f"{where}: {extra[0]} is not for {block['quant_algo']}")
    _check_dtypes(tensors, algorithm.number, where)
    twice = algorithm.number == "int4" and "scale_2" in tensors
    pre_quant_scale, given = tensors.get("pre_quant_scale"), tensors.get("input_scale")
    low_rank = None
    if "low_rank_a" in tensors:
        low_rank = (tensors["low_rank_a"].float(), tensors["low_rank_b"].float())
    return ReadLinear(
        codes=tensors,
        decode=partial(_values, algorithm.number, twice),
        number=algorithm.number,
        fp8_roundings=int(twice),
        pre_quant_scale=None if pre_quant_scale is None else pre_quant_scale.float(),
        low_rank=low_rank,
        input_scale=None if given is None else given.reshape(()),
        rounding=algorithm.rounding,
    )


def _values(number: str, twice: bool, tensors: Codes) -> Dequantized:
    """Weight and step; twice: their product is rounded to fp8 in units of scale_2."""
    unpack = UNPACK.get(number)
    values = tensors["weight"].float() if unpack is None else unpack(tensors["weight"])
    step = _spread(tensors["scale"].float(), values.shape[1])
    if "scale_2" in tensors and not twice:
        step = step * tensors["scale_2"]
    weight = values * step
    if twice:
        weight = to_fp8(weight / tensors["scale_2"]) * tensors["scale_2"]
    return Dequantized(weight, step)


def _spread(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """A scale in a shape that multiplies a weight [O,K]."""
    if scale.dim() == 2:
        return scale.repeat_interleave(columns // scale.shape[1], dim=1)
    return scale[:, None] if scale.numel() > 1 else scale


def _check_dtypes(tensors: Mapping[str, torch.Tensor], number: str, where: str) -> None:
    wanted = {"scale": torch.float8_e4m3fn if number == "nvfp4" else torch.float32}
    wanted |= dict.fromkeys(("scale_2", "input_scale"), torch.float32)
    for name, dtype in wanted.items():
        if name in tensors and tensors[name].dtype != dtype:
            raise VerificationError(f"{where}: {name} is {tensors[name].dtype}, not {dtype}")
    if tensors["weight"].dtype not in WEIGHT_DTYPES.get(number, BYTES):
        raise VerificationError(f"{where}: weight is {tensors['weight'].dtype}")
