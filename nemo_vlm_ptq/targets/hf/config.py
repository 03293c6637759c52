"""config.json and hf_quant_config.json of a unified Hugging Face checkpoint."""

from __future__ import annotations

from typing import Any

from nemo_vlm_ptq import __version__
from nemo_vlm_ptq.formats import KvCacheFormat, QuantFormat
from nemo_vlm_ptq.targets.writing.encode import group_settings

PRODUCER = {"name": "nemo_vlm_ptq", "version": __version__}
# vLLM and SGLang (get_quant_config) and TensorRT-LLM's AutoDeploy reject an hf_quant_config.json
# whose producer is not modelopt. The layout is modelopt 0.47's.
LAYOUT_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
FLOAT_BITS = {"FP8": 8, "NVFP4": 4, "NVFP4_SVD": 4}  # quant_algo -> bits described by a group


def quantization_block(
    fmt: QuantFormat, group_size: int, excluded: list[str], kv: KvCacheFormat | None
) -> dict[str, Any]:
    """Return the `quantization` block of hf_quant_config.json.

    Args:
        fmt: the format.
        group_size: the recipe's group size.
        excluded: modules that stay in 16 bit.
        kv: KV cache format, or None.
    """
    block: dict[str, Any] = {
        "quant_algo": fmt.quant_algo,
        "kv_cache_quant_algo": None if kv is None else kv.quant_algo,
        **group_settings(fmt, group_size),
    }
    if fmt.low_rank:
        block["lora_rank"] = fmt.low_rank
    return block | {"exclude_modules": excluded}


def config_files(source_config: dict[str, Any], block: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return config.json, the source's with a quantization_config, and hf_quant_config.json."""
    hf_quant_config = {"producer": LAYOUT_PRODUCER, "exporter": PRODUCER, "quantization": block}
    return {
        "config.json": source_config | {"quantization_config": _quantization_config(block)},
        "hf_quant_config.json": hf_quant_config,
    }


def _quantization_config(block: dict[str, Any]) -> dict[str, Any]:
    """Return modelopt's `quantization_config`, with the keys of the block added.

    Servers read the KV cache from `kv_cache_scheme`, and group sizes from either place.
    """
    config = {key: value for key, value in block.items() if key != "exclude_modules"}
    bits = FLOAT_BITS.get(block["quant_algo"])
    if bits is not None:
        numbers = {"dynamic": False, "num_bits": bits, "type": "float"}
        if "group_size" in block:
            numbers["group_size"] = block["group_size"]
        copied = ("has_zero_point", "pre_quant_scale", "lora_rank")
        group = {
            "input_activations": numbers,
            "weights": numbers,
            **{key: block[key] for key in copied if key in block},
            "targets": ["Linear"],
        }
        config["config_groups"] = {"group_0": group}
    scheme = block["kv_cache_quant_algo"]
    if scheme == "FP8":
        scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    if scheme is not None:
        config["kv_cache_scheme"] = scheme
    return config | {
        "ignore": block["exclude_modules"],
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
