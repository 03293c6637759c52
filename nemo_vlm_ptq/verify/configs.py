"""The JSON beside the weights: does it describe this model in this format, and no other?"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.families.base import Decoder
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.source import header


def check_trtllm_config(
    folder: Path, decoder: Decoder, fmt: QuantFormat, group: int, dtype: str
) -> list[str]:
    """config.json of a TensorRT-LLM checkpoint against the source's facts."""
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.ffn,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_size": decoder.head_dim,
        "vocab_size": decoder.vocab,
        "norm_epsilon": decoder.norm_eps,
        "rotary_base": decoder.rope_theta,
        "max_position_embeddings": decoder.max_positions,
        "hidden_act": "silu",
        "position_embedding_type": "rope_gpt_neox",
        "dtype": dtype,
    }
    rope = decoder.long_rope
    if config["architecture"] == "Phi3ForCausalLM":
        expected["hidden_act"] = "swiglu"
    if rope is not None:
        expected |= {
            "position_embedding_type": "long_rope",
            "original_max_position_embeddings": rope.original,
            "longrope_scaling_short_factors": list(rope.short),
            "longrope_scaling_long_factors": list(rope.long),
        }
    return _differences("config.json", config, expected) + _quantization(
        "config.json", config["quantization"], fmt, group
    )


def check_hf_configs(
    folder: Path, source: Mapping[str, Any], fmt: QuantFormat, group: int
) -> list[str]:
    """config.json, hf_quant_config.json and the index of a unified checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    problems = _differences("config.json", config, source)
    block = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    problems += _quantization("hf_quant_config.json", block, fmt, group)
    problems += _quantization("config.json", config["quantization_config"], fmt, group)
    names = [name for path in folder.glob("*.safetensors") for name in header(path)]
    scaled = {name.removesuffix("_scale") for name in names if name.endswith(".weight_scale")}
    plain = [name for name in names if name.endswith(".weight") and name not in scaled]
    untouched = sorted(name.removesuffix(".weight") for name in plain)
    problems += _differences("hf_quant_config.json", block, {"exclude_modules": untouched})
    problems += _differences("config.json", config["quantization_config"], {"ignore": untouched})
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    held = {name: path.name for path in folder.glob("*.safetensors") for name in header(path)}
    if index != held:
        problems.append("model.safetensors.index.json does not say where the tensors are")
    return problems


def _quantization(where: str, block: Mapping[str, Any], fmt: QuantFormat, group: int) -> list[str]:
    expected: dict[str, Any] = {"quant_algo": fmt.quant_algo, "kv_cache_quant_algo": None}
    if fmt.granularity == "group":
        expected |= {"group_size": group, "has_zero_point": False, "pre_quant_scale": True}
    return _differences(where, block, expected)


def _differences(where: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    return [
        f"{where}: {key} is {reprlib.repr(found.get(key))}, not {reprlib.repr(value)}"
        for key, value in expected.items()
        if found.get(key) != value
    ]
