"""Findings and config comparisons that the checks of several targets share."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.formats import KvCacheFormat, QuantFormat

INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check of a checkpoint: its name, its findings (empty: passed), and what it covered."""

    name: str
    findings: list[str]
    about: str


@dataclass(frozen=True, kw_only=True)
class ExpectedQuantization:
    """How a checkpoint must be quantized: format, the recipe's group size, KV cache or None."""

    fmt: QuantFormat
    group_size: int
    kv: KvCacheFormat | None


def differences(where: str, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return one line for each expected key whose value is another."""
    return [
        f"{where}: {key} is {reprlib.repr(actual.get(key))}, expected {reprlib.repr(value)}"
        for key, value in expected.items()
        if actual.get(key) != value
    ]


def quantization_differences(
    where: str, block: Mapping[str, Any], expected: ExpectedQuantization
) -> list[str]:
    """Compare a quantization block of TensorRT-LLM or modelopt with what it must say."""
    fmt, kv = expected.fmt, expected.kv
    values: dict[str, Any] = {
        "quant_algo": fmt.quant_algo,
        "kv_cache_quant_algo": None if kv is None else kv.quant_algo,
    }
    uses_awq = fmt.algorithm == "awq"
    if fmt.weight == "int4":
        values |= {"group_size": expected.group_size, "has_zero_point": False}
        values |= {"pre_quant_scale": uses_awq}
    if fmt.weight == "nvfp4":
        values["group_size"] = 16
        if uses_awq:
            values |= {"has_zero_point": False, "pre_quant_scale": True}
    if fmt.low_rank:
        values["lora_rank"] = fmt.low_rank
    return differences(where, block, values)


def index_differences(folder: Path, names: Mapping[str, str]) -> list[str]:
    """Compare the safetensors index with the files; names: tensor -> file."""
    weight_map = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    if weight_map != names:
        return [f"{INDEX_FILE} does not match the tensors in the files"]
    return []
