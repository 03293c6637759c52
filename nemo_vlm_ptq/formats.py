"""The quantization formats, one row each: numerics, algorithm, and who reads the result.

Scales multiply codes to give values back: value = code * scale. `amax` is the largest magnitude.
Field names of the exported tensors follow TensorRT-LLM 1.2 and modelopt 0.47.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_vlm_ptq.errors import UserError

Kind = Literal["fp8", "int8", "int4"]
Granularity = Literal["tensor", "channel", "group"]

# Largest code of each kind of number; scale = amax / largest.
LARGEST: dict[str, float] = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
LOWEST: dict[str, float] = {"fp8": -448.0, "int8": -128.0, "int4": -8.0}


@dataclass(frozen=True)
class QuantFormat:
    """One format: what becomes of weights and activations, and where it can be read."""

    name: str
    weight: Kind
    granularity: Granularity  # one weight scale per tensor, per output channel, per group of K
    activation: Kind | None  # static, per tensor; None keeps 16 bit
    algorithm: Literal["max", "smoothquant", "awq"]
    weight_second: Kind | None  # second, per-tensor rounding of the dequantized weight (W4A8)
    trtllm_algo: str  # quantization.quant_algo in TensorRT-LLM's config.json
    modelopt_preset: str  # name of the preset in modelopt.torch.quantization
    targets: tuple[str, ...]
    bits: int
    about: str

    @property
    def prequant(self) -> bool:
        """A scale per input channel stands in front of each linear."""
        return self.algorithm != "max"

    @property
    def second_moments(self) -> bool:
        """The algorithm needs sum x x^T of every linear input."""
        return self.algorithm == "awq"


FORMATS: dict[str, QuantFormat] = {
    row.name: row
    for row in (
        QuantFormat(
            "fp8", "fp8", "tensor", "fp8", "max", None, "FP8", "FP8_DEFAULT_CFG",
            ("trtllm", "hf"), 8, "weights and activations e4m3, one scale a tensor",
        ),
        QuantFormat(
            "int8_sq", "int8", "channel", "int8", "smoothquant", None, "W8A8_SQ_PER_CHANNEL",
            "INT8_SMOOTHQUANT_CFG", ("trtllm",), 8,
            "weights int8 per channel, activations int8, SmoothQuant",
        ),
        QuantFormat(
            "int4_awq", "int4", "group", None, "awq", None, "W4A16_AWQ", "INT4_AWQ_CFG",
            ("trtllm", "hf"), 4, "weights int4 in groups, activations 16 bit, AWQ",
        ),
        QuantFormat(
            "w4a8_awq", "int4", "group", "fp8", "awq", "fp8", "W4A8_AWQ", "W4A8_AWQ_BETA_CFG",
            ("trtllm", "hf"), 4, "weights int4 in groups, activations e4m3, AWQ",
        ),
    )
}  # fmt: skip

ALIASES = {
    "int8_smoothquant": "int8_sq",
    "w4a8_awq_beta": "w4a8_awq",
    "fp8_default": "fp8",
}

TARGETS = ("trtllm", "hf")


def find_format(name: str) -> QuantFormat:
    """The row of a format by its name or alias.

    Raises:
        UserError: unknown name; lists the known ones.
    """
    row = FORMATS.get(ALIASES.get(name, name))
    if row is None:
        raise UserError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    return row
