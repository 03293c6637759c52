"""Quantization formats, one row each: number formats, granularity, algorithm, exported name.

A scale multiplies a code to dequantize it: value = code * scale. `amax` is the largest magnitude.
Names in exported files follow TensorRT-LLM 1.2 and modelopt 0.47. Which targets store a format is
declared by each target (targets/*/spec.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_vlm_ptq.errors import UserError

NumberFormat = Literal["fp8", "int8", "int4", "nvfp4", "nf4"]
Granularity = Literal["tensor", "channel", "group"]
# Quantization of a linear's input: static per tensor (fp8, int8), dynamic per token (fp8_token), or
# dynamic e4m3 scales of blocks of 16 under a static global scale (nvfp4).
InputFormat = Literal["fp8", "int8", "fp8_token", "nvfp4"]
Algorithm = Literal["max", "smoothquant", "awq"]

# Largest and smallest code of each number format; scale = amax / MAX_CODE.
MAX_CODE: dict[str, float] = {"fp8": 448.0, "int8": 127.0, "int4": 7.0, "nvfp4": 6.0, "nf4": 1.0}
MIN_CODE: dict[str, float] = {"fp8": -448.0, "int8": -128.0, "int4": -8.0}
NVFP4_BLOCK, NF4_BLOCK = 16, 64  # inputs that share a scale
# Up to this an amax counts as zero, as in modelopt: codes and scales of smaller ones overflow.
MIN_AMAX = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class QuantFormat:
    """One format of weights and activations.

    name: value of `quantize.format`.
    weight: number format of the weights.
    granularity: one solved amax per tensor, per output channel, or per group of inputs.
    activation: quantization of each linear's input; None keeps 16 bit.
    algorithm: how scales are solved.
    quant_algo: name in TensorRT-LLM's config.json and modelopt's hf_quant_config.json.
    modelopt_preset: name in modelopt.torch.quantization; empty where modelopt has none.
    bits: bits per weight, scales included where they are many.
    second_weight: number format of a second, per-tensor quantization of the dequantized weight.
    block: inputs per scale where the format fixes them; None uses the recipe's group_size.
    low_rank: rank of the 16 bit low-rank branch of SVDQuant; 0 for none.
    shares_kv_head_scale: query heads that share a KV head get one pre_quant_scale for o_proj, so
        that targets without pre_quant_scales can fold it into v_proj.
    """

    name: str
    weight: NumberFormat
    granularity: Granularity
    activation: InputFormat | None
    algorithm: Algorithm
    quant_algo: str
    modelopt_preset: str
    bits: float
    about: str
    second_weight: NumberFormat | None = None
    block: int | None = None
    low_rank: int = 0
    shares_kv_head_scale: bool = False

    @property
    def uses_pre_quant_scale(self) -> bool:
        """Whether a scale per input channel multiplies the input of each linear."""
        return self.algorithm != "max"

    @property
    def grouped(self) -> bool:
        """Whether groups of inputs share a weight scale, so that no shard may split a group."""
        return self.granularity == "group" or self.block is not None

    def group(self, group_size: int) -> int:
        """Return the inputs per weight scale, given the recipe's group_size."""
        return self.block or group_size


FORMATS: dict[str, QuantFormat] = {
    fmt.name: fmt
    for fmt in (
        QuantFormat(
            name="fp8",
            weight="fp8",
            granularity="tensor",
            activation="fp8",
            algorithm="max",
            quant_algo="FP8",
            modelopt_preset="FP8_DEFAULT_CFG",
            bits=8,
            about="weights and activations e4m3, per tensor",
        ),
        QuantFormat(
            name="fp8_pc_pt",
            weight="fp8",
            granularity="channel",
            activation="fp8_token",
            algorithm="max",
            quant_algo="FP8_PER_CHANNEL_PER_TOKEN",
            modelopt_preset="FP8_PER_CHANNEL_PER_TOKEN_CFG",
            bits=8,
            about="weights e4m3 per channel, activations e4m3 per token",
        ),
        QuantFormat(
            name="int8_sq",
            weight="int8",
            granularity="channel",
            activation="int8",
            algorithm="smoothquant",
            quant_algo="W8A8_SQ_PER_CHANNEL",
            modelopt_preset="INT8_SMOOTHQUANT_CFG",
            bits=8,
            about="weights int8 per channel, activations int8",
        ),
        QuantFormat(
            name="int4_awq",
            weight="int4",
            granularity="group",
            activation=None,
            algorithm="awq",
            quant_algo="W4A16_AWQ",
            modelopt_preset="INT4_AWQ_CFG",
            bits=4,
            about="weights int4 in groups, activations 16 bit",
            shares_kv_head_scale=True,
        ),
        QuantFormat(
            name="w4a8_awq",
            weight="int4",
            granularity="group",
            activation="fp8",
            algorithm="awq",
            quant_algo="W4A8_AWQ",
            modelopt_preset="W4A8_AWQ_BETA_CFG",
            bits=4,
            about="weights int4 in groups, activations e4m3",
            second_weight="fp8",
            shares_kv_head_scale=True,
        ),
        QuantFormat(
            name="nvfp4",
            weight="nvfp4",
            granularity="tensor",
            activation="nvfp4",
            algorithm="max",
            quant_algo="NVFP4",
            modelopt_preset="NVFP4_DEFAULT_CFG",
            bits=4.5,
            about="weights and activations e2m1 in blocks of 16",
            block=NVFP4_BLOCK,
        ),
        QuantFormat(
            name="nvfp4_awq",
            weight="nvfp4",
            granularity="tensor",
            activation="nvfp4",
            algorithm="awq",
            quant_algo="NVFP4_AWQ",
            modelopt_preset="NVFP4_AWQ_LITE_CFG",
            bits=4.5,
            about="nvfp4 with AWQ's pre_quant_scales",
            block=NVFP4_BLOCK,
        ),
        QuantFormat(
            name="nvfp4_svdquant",
            weight="nvfp4",
            granularity="tensor",
            activation="nvfp4",
            algorithm="awq",
            quant_algo="NVFP4_SVD",
            modelopt_preset="NVFP4_SVDQUANT_DEFAULT_CFG",
            bits=4.5,
            about="nvfp4_awq with a 16 bit low-rank branch",
            block=NVFP4_BLOCK,
            low_rank=32,
        ),
        QuantFormat(
            name="int8_wo",
            weight="int8",
            granularity="channel",
            activation=None,
            algorithm="max",
            quant_algo="W8A16",
            modelopt_preset="INT8_WEIGHT_ONLY_CFG",
            bits=8,
            about="weights int8 per channel, activations 16 bit",
        ),
        QuantFormat(
            name="int4_wo",
            weight="int4",
            granularity="group",
            activation=None,
            algorithm="max",
            quant_algo="W4A16_AWQ",
            modelopt_preset="INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
            bits=4,
            about="weights int4 in groups, activations 16 bit",
        ),
        QuantFormat(
            name="nf4",
            weight="nf4",
            granularity="group",
            activation=None,
            algorithm="max",
            quant_algo="NF4",
            modelopt_preset="",
            bits=4.13,
            about="weights NF4 in blocks of 64, double-quantized",
            block=NF4_BLOCK,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class KvCacheFormat:
    """One KV cache format, with one static scale for a layer's keys and one for its values.

    quant_algo: kv_cache_quant_algo in TensorRT-LLM's and modelopt's config files.
    """

    name: str
    number_format: NumberFormat
    quant_algo: str


KV_CACHES: dict[str, KvCacheFormat] = {
    kv_cache.name: kv_cache
    for kv_cache in (
        KvCacheFormat(name="fp8", number_format="fp8", quant_algo="FP8"),
        KvCacheFormat(name="int8", number_format="int8", quant_algo="INT8"),
        KvCacheFormat(name="nvfp4", number_format="nvfp4", quant_algo="NVFP4"),
    )
}

# Names of the same formats in modelopt, TensorRT-LLM and compressed-tensors.
FORMAT_ALIASES = {
    "int8_smoothquant": "int8_sq",
    "w8a8_sq_per_channel": "int8_sq",
    "w4a8_awq_beta": "w4a8_awq",
    "w4a16_awq": "int4_awq",
    "fp8_default": "fp8",
    "fp8_dynamic": "fp8_pc_pt",
    "fp8_per_channel_per_token": "fp8_pc_pt",
    "nvfp4_default": "nvfp4",
    "nvfp4_awq_lite": "nvfp4_awq",
    "nvfp4_svd": "nvfp4_svdquant",
    "nvfp4_svdquant_default": "nvfp4_svdquant",
    "int8_weight_only": "int8_wo",
    "w8a16": "int8_wo",
    "int4_blockwise_weight_only": "int4_wo",
}
# Names of something else, or of several formats -> the formats that come nearest.
RELATED_FORMATS = {
    ("w4a16", "w4a16_asym", "int4", "w4", "gptq"): "int4_awq (searched scales) or int4_wo",
    ("awq",): "int4_awq, w4a8_awq or nvfp4_awq",
    ("w8a8", "int8", "smoothquant", "sq", "w8"): "int8_sq (activations too) or int8_wo",
    ("w4a8", "w4afp8", "w4a8_fp8"): "w4a8_awq (int4 weights, e4m3 activations)",
    ("fp8_block", "fp8_pb_wo", "w8a8_fp8", "e4m3", "mxfp8", "float8"): "fp8 or fp8_pc_pt",
    ("nvfp4a16", "mxfp4", "mxfp4a16", "fp4", "w4a4"): "nvfp4",
    ("svdquant",): "nvfp4_svdquant",
    ("bnb", "bitsandbytes", "bnb_4bit", "qlora"): "nf4",
}
SIXTEEN_BIT = ("none", "fp16", "bf16", "float16", "bfloat16", "half", "unquantized", "16bit")


def find_format(name: str) -> QuantFormat:
    """Return the row of a format by its name or alias, in any case.

    Raises:
        UserError: the name is unknown; says which formats come near, or lists all.
    """
    word = name.strip().lower().replace("-", "_").removesuffix("_cfg")
    fmt = FORMATS.get(FORMAT_ALIASES.get(word, word))
    if fmt is not None:
        return fmt
    if word in SIXTEEN_BIT:
        raise UserError(
            f"format {name!r} is that of the model itself, which is not quantized; supported: "
            f"{', '.join(FORMATS)}"
        )
    for words, formats in RELATED_FORMATS.items():
        if word in words:
            raise UserError(f"format {name!r} is not supported as such; use {formats}")
    raise UserError(f"unknown format {name!r}; supported: {', '.join(FORMATS)}")
