"""What a reader makes of a written checkpoint, whoever wrote it and in whatever form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from nemo_vlm_ptq.errors import ProofError

Rounding = Literal["fp8", "int8"]


@dataclass(frozen=True)
class ReadLinear:
    """A quantized linear as its consumer computes it.

    weight [O,K] float32, dequantized, to be multiplied with x * prequant; step [O,K] or a shape
    that spreads to it: the distance between neighbouring codes (fp8: at the top of the range);
    prequant [K], input_scale [] and its rounding, or None.
    """

    weight: torch.Tensor
    step: torch.Tensor
    rounding_weight: str
    prequant: torch.Tensor | None
    input_scale: torch.Tensor | None
    rounding: Rounding | None


@dataclass(frozen=True)
class ReadCheckpoint:
    """Linears by Hugging Face name without `.weight`, all other tensors by full name."""

    linears: dict[str, ReadLinear]
    plain: dict[str, torch.Tensor]


# quant_algo -> (rounding of activations, bits of a weight code)
ALGORITHMS: dict[str | None, tuple[Rounding | None, str]] = {
    "FP8": ("fp8", "fp8"),
    "W8A8_SQ_PER_CHANNEL": ("int8", "int8"),
    "W4A16_AWQ": (None, "int4"),
    "W4A8_AWQ": ("fp8", "int4"),
}


def unpack_rows(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [O/2,K] -> int4 values [O,K] int8; the low nibble is the even row."""
    raw = packed.view(torch.uint8).to(torch.int16)
    nibbles = torch.stack([raw & 15, raw >> 4], dim=1).flatten(0, 1)
    return torch.where(nibbles > 7, nibbles - 16, nibbles).to(torch.int8)


def dequantize(tensors: dict[str, torch.Tensor], algorithm: str, where: str) -> ReadLinear:
    """A linear from its tensors: weight, scale, and where the algorithm has them scale_2,
    input_scale and prequant.

    Raises:
        ProofError: unknown algorithm, or a tensor the algorithm needs is not there.
    """
    if algorithm not in ALGORITHMS:
        raise ProofError(f"{where}: quant_algo {algorithm!r} is not known")
    rounding, bits = ALGORITHMS[algorithm]
    needed = {"weight", "scale"}
    needed |= {"input_scale"} if rounding else set()
    needed |= {"prequant"} if algorithm != "FP8" else set()
    needed |= {"scale_2"} if algorithm == "W4A8_AWQ" else set()
    if missing := sorted(needed - set(tensors)):
        raise ProofError(f"{where}: {missing[0]} is missing")
    for name in ("scale", "scale_2", "input_scale"):
        if name in tensors and tensors[name].dtype != torch.float32:
            raise ProofError(f"{where}: {name} is {tensors[name].dtype}, not torch.float32")
    codes = tensors["weight"]
    codes = unpack_rows(codes) if bits == "int4" else codes
    scale = tensors["scale"].float()
    if scale.dim() == 2:
        scale = scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
    elif scale.numel() > 1:
        scale = scale[:, None]
    weight = codes.float() * scale
    if "scale_2" in tensors:
        second = tensors["scale_2"].float()
        weight = (weight / second).clamp(-448, 448).to(torch.float8_e4m3fn).float() * second
    prequant = tensors.get("prequant")
    given = tensors.get("input_scale")
    return ReadLinear(
        weight=weight,
        step=scale,
        rounding_weight=bits,
        prequant=None if prequant is None else prequant.float(),
        input_scale=None if given is None or rounding is None else given.float().reshape(()),
        rounding=rounding,
    )
