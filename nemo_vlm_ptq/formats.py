"""The quantization formats, one row each: numerics, algorithm, and who reads the result.

Scales multiply codes to give values back: value = code * scale. `amax` is the largest magnitude.
Field names of the exported tensors follow TensorRT-LLM 1.2 and modelopt 0.47.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_vlm_ptq.errors import UserError

NumberFormat = Literal["fp8", "int8", "int4", "nvfp4", "nf4"]
Granularity = Literal["tensor", "channel", "group"]
# Rounding of a linear's input: static and per tensor; per token as it comes; in blocks of 16 with
# dynamic e4m3 scales under a static one.
InputFormat = Literal["fp8", "int8", "fp8_token", "nvfp4"]

# Largest code of each kind of number; scale = amax / largest.
MAX_CODE: dict[str, float] = {"fp8": 448.0, "int8": 127.0, "int4": 7.0, "nvfp4": 6.0, "nf4": 1.0}
MIN_CODE: dict[str, float] = {"fp8": -448.0, "int8": -128.0, "int4": -8.0}
NVFP4_BLOCK, NF4_BLOCK = 16, 64  # inputs that share a scale
# Inputs of a group that the kernels for int4 behind a target take.
INT4_GROUP_SIZES = {"trtllm": (64, 128), "compressed_tensors": (32, 64, 128)}


@dataclass(frozen=True)
class QuantFormat:
    """One format: what becomes of weights and activations, and where it can be read."""

    name: str
    weight: NumberFormat
    granularity: Granularity  # one solved amax per tensor, per output channel, per group of K
    activation: InputFormat | None  # None keeps 16 bit
    algorithm: Literal["max", "smoothquant", "awq"]
    quant_algo: str  # in TensorRT-LLM's config.json and modelopt's hf_quant_config.json
    modelopt_preset: str  # name of the preset in modelopt.torch.quantization; "" when it has none
    targets: tuple[str, ...]
    bits: float  # of a weight, its scales included where they are many
    about: str
    second_weight: NumberFormat | None = (
        None  # second, per-tensor rounding of the dequantized weight
    )
    block: int | None = None  # inputs of a block where the format fixes it, else recipe.group_size
    low_rank: int = 0  # rank of the 16 bit branch beside the rounded weight (SVDQuant)

    @property
    def pre_quant_scale(self) -> bool:
        """A scale per input channel stands in front of each linear."""
        return self.algorithm != "max"

    @property
    def grouped(self) -> bool:
        """Groups of inputs share a weight scale, and no shard may cut one."""
        return self.granularity == "group" or self.block is not None

    def group(self, group_size: int) -> int:
        """Inputs that share a weight scale, given the recipe's group size."""
        return self.block or group_size


FORMATS: dict[str, QuantFormat] = {
    row.name: row
    for row in (
        QuantFormat(
            "fp8", "fp8", "tensor", "fp8", "max", "FP8", "FP8_DEFAULT_CFG",
            ("trtllm", "hf", "compressed_tensors", "nemo"), 8,
            "weights and activations e4m3, one scale a tensor",
        ),
        QuantFormat(
            "fp8_pc_pt", "fp8", "channel", "fp8_token", "max", "FP8_PER_CHANNEL_PER_TOKEN",
            "FP8_PER_CHANNEL_PER_TOKEN_CFG", ("hf", "compressed_tensors", "nemo"), 8,
            "weights e4m3 per channel, activations e4m3 per token as they come",
        ),
        QuantFormat(
            "int8_sq", "int8", "channel", "int8", "smoothquant", "W8A8_SQ_PER_CHANNEL",
            "INT8_SMOOTHQUANT_CFG", ("trtllm", "compressed_tensors", "nemo"), 8,
            "weights int8 per channel, activations int8, SmoothQuant",
        ),
        QuantFormat(
            "int4_awq", "int4", "group", None, "awq", "W4A16_AWQ", "INT4_AWQ_CFG",
            ("trtllm", "hf", "compressed_tensors", "nemo"), 4,
            "weights int4 in groups, activations 16 bit, AWQ",
        ),
        QuantFormat(
            "w4a8_awq", "int4", "group", "fp8", "awq", "W4A8_AWQ", "W4A8_AWQ_BETA_CFG",
            ("trtllm", "hf", "compressed_tensors", "nemo"), 4,
            "weights int4 in groups, activations e4m3, AWQ",
            second_weight="fp8",
        ),
        QuantFormat(
            "nvfp4", "nvfp4", "tensor", "nvfp4", "max", "NVFP4", "NVFP4_DEFAULT_CFG",
            ("trtllm", "hf", "compressed_tensors", "nemo"), 4.5,
            "weights and activations e2m1 in blocks of 16 with e4m3 scales",
            block=NVFP4_BLOCK,
        ),
        QuantFormat(
            "nvfp4_awq", "nvfp4", "tensor", "nvfp4", "awq", "NVFP4_AWQ", "NVFP4_AWQ_LITE_CFG",
            ("hf", "nemo"), 4.5, "nvfp4 with AWQ's scales in front of the linears",
            block=NVFP4_BLOCK,
        ),
        QuantFormat(
            "nvfp4_svdquant", "nvfp4", "tensor", "nvfp4", "awq", "NVFP4_SVD",
            "NVFP4_SVDQUANT_DEFAULT_CFG", ("hf",), 4.5,
            "nvfp4_awq of what a 16 bit branch of rank 32 leaves over (SVDQuant)",
            block=NVFP4_BLOCK, low_rank=32,
        ),
        QuantFormat(
            "int8_wo", "int8", "channel", None, "max", "W8A16", "INT8_WEIGHT_ONLY_CFG",
            ("hf", "compressed_tensors", "nemo"), 8, "weights int8 per channel, activations 16 bit",
        ),
        QuantFormat(
            "int4_wo", "int4", "group", None, "max", "W4A16_AWQ", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
            ("hf", "compressed_tensors", "nemo"), 4, "weights int4 in groups, activations 16 bit",
        ),
        QuantFormat(
            "nf4", "nf4", "group", None, "max", "NF4", "",
            ("hf",), 4.13, "weights NF4 in blocks of 64, doubly quantized, as bitsandbytes has it",
            block=NF4_BLOCK,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class KvCacheFormat:
    """Numbers of a KV cache, one static scale for all keys of a layer and one for all values."""

    name: str
    kind: NumberFormat
    quant_algo: str  # kv_cache_quant_algo in TensorRT-LLM's and modelopt's config files
    targets: tuple[str, ...]


KV_CACHES: dict[str, KvCacheFormat] = {
    row.name: row
    for row in (
        KvCacheFormat("fp8", "fp8", "FP8", ("trtllm", "hf", "compressed_tensors")),
        KvCacheFormat("int8", "int8", "INT8", ("trtllm",)),
        KvCacheFormat("nvfp4", "nvfp4", "NVFP4", ("hf",)),
    )
}

FORMAT_ALIASES = {
    "int8_smoothquant": "int8_sq",
    "w4a8_awq_beta": "w4a8_awq",
    "fp8_default": "fp8",
    "nvfp4_default": "nvfp4",
    "nvfp4_awq_lite": "nvfp4_awq",
    "nvfp4_svdquant_default": "nvfp4_svdquant",
    "fp8_per_channel_per_token": "fp8_pc_pt",
    "int8_weight_only": "int8_wo",
    "int4_blockwise_weight_only": "int4_wo",
}

TARGETS = ("trtllm", "hf", "compressed_tensors", "nemo")


def find_format(name: str) -> QuantFormat:
    """The row of a format by its name or alias.

    Raises:
        UserError: unknown name; lists the known ones.
    """
    row = FORMATS.get(FORMAT_ALIASES.get(name, name))
    if row is None:
        raise UserError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    return row
