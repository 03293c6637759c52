"""The JSON beside the weights: does it describe this model in this format, and no other?"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.checkpoints.huggingface import read_safetensors_header
from nemo_vlm_ptq.families.base import Decoder
from nemo_vlm_ptq.formats import KvCacheFormat, QuantFormat

BITSANDBYTES = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": "uint8",
}


# Format -> how compressed-tensors describes it: layout, weights, inputs.
_TENSOR = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False}
_TOKEN = {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True}
_CHANNEL = {"type": "int", "num_bits": 8, "strategy": "channel"}
_GROUP = {"type": "int", "num_bits": 4, "strategy": "group"}
_BLOCK = {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16}
COMPRESSED: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "fp8": ("float-quantized", _TENSOR, _TENSOR),
    "fp8_pc_pt": ("float-quantized", _TENSOR | {"strategy": "channel"}, _TOKEN),
    "int8_sq": ("int-quantized", _CHANNEL, _TENSOR | {"type": "int"}),
    "int4_awq": ("pack-quantized", _GROUP, None),
    "w4a8_awq": ("pack-quantized", _GROUP, _TOKEN),
    "int8_wo": ("pack-quantized", _CHANNEL, None),
    "int4_wo": ("pack-quantized", _GROUP, None),
    "nvfp4": ("nvfp4-pack-quantized", _BLOCK, _BLOCK | {"dynamic": "local"}),
}


@dataclass(frozen=True)
class ExpectedQuantization:
    """How a checkpoint should be quantized: format, inputs of a group, and KV cache or None."""

    fmt: QuantFormat
    group: int
    kv: KvCacheFormat | None


def check_trtllm_config(
    folder: Path, decoder: Decoder, wanted: ExpectedQuantization, dtype: str
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
        "config.json", config["quantization"], wanted
    )


def check_hf_configs(
    folder: Path, source: Mapping[str, Any], wanted: ExpectedQuantization
) -> list[str]:
    """config.json, hf_quant_config.json and the index of a Hugging Face checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    problems = _differences("config.json", config, source)
    names = {
        name: path.name
        for path in folder.glob("*.safetensors")
        for name in read_safetensors_header(path)
    }
    if wanted.fmt.weight == "nf4":
        own = config["quantization_config"]
        problems += _differences("config.json", own, BITSANDBYTES)
        problems += _check_skipped(own["llm_int8_skip_modules"], names)
    else:
        problems += _check_modelopt(folder, config["quantization_config"], names, wanted)
    return problems + _check_index(folder, names)


def check_compressed_configs(
    folder: Path, source: Mapping[str, Any], wanted: ExpectedQuantization
) -> list[str]:
    """config.json and the index of a compressed-tensors checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    problems = _differences("config.json", config, source)
    own = config["quantization_config"]
    layout, weights, inputs = COMPRESSED[wanted.fmt.name]
    if weights is _GROUP:
        weights = _GROUP | {"group_size": wanted.group}
    expected = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    problems += _differences("config.json", own, expected | {"format": layout})
    (group,) = own["config_groups"].values()
    problems += _differences("config.json", group, {"targets": ["Linear"], "format": layout})
    scheme = own.get("kv_cache_scheme")
    pairs = [
        (group["weights"], weights | {"dynamic": False}),
        (scheme, None if wanted.kv is None else _TENSOR),
    ]
    for found, known in [*pairs, (group.get("input_activations"), inputs)]:
        if known is None or found is None:
            problems += [] if found is known else [f"config.json: {found} where {known} should be"]
        else:
            problems += _differences("config.json", found, known | {"symmetric": True})
    headers = {path: read_safetensors_header(path) for path in folder.glob("*.safetensors")}
    shapes = {name: len(one["shape"]) for own in headers.values() for name, one in own.items()}
    problems += _check_ignored(config["quantization_config"]["ignore"], shapes)
    return problems + _check_index(
        folder, {name: path.name for path, own in headers.items() for name in own}
    )


def _check_ignored(ignored: Sequence[str], axes: Mapping[str, int]) -> list[str]:
    """No quantized linear is ignored, and every other module with a matrix is."""
    problems = []
    for name in sorted(axes):
        module, _, last = name.rpartition(".")
        quantized = f"{module}.weight_scale" in axes
        if last not in ("weight", "weight_packed") or (axes[name] < 2 and not quantized):
            continue
        if quantized == any(re.match(one.removeprefix("re:"), module) for one in ignored):
            problems.append(f"config.json: ignore is wrong for {module}")
    return problems


def _check_index(folder: Path, names: Mapping[str, str]) -> list[str]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    if index != names:
        return ["model.safetensors.index.json does not say where the tensors are"]
    return []


def _check_modelopt(
    folder: Path, own: Mapping[str, Any], names: Iterable[str], wanted: ExpectedQuantization
) -> list[str]:
    """Both of modelopt's descriptions, and the modules that they leave out."""
    block = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    problems = _quantization("hf_quant_config.json", block, wanted)
    problems += _quantization("config.json", own, wanted)
    scheme: Any = wanted.kv and wanted.kv.quant_algo
    if scheme == "FP8":
        scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    problems += _differences("config.json", own, {"kv_cache_scheme": scheme})
    scaled = {name.removesuffix("_scale") for name in names if name.endswith(".weight_scale")}
    plain = [name for name in names if name.endswith(".weight") and name not in scaled]
    untouched = sorted(name.removesuffix(".weight") for name in plain)
    problems += _differences("hf_quant_config.json", block, {"exclude_modules": untouched})
    return problems + _differences("config.json", own, {"ignore": untouched})


def _check_skipped(skipped: Iterable[str], names: Iterable[str]) -> list[str]:
    """The modules that transformers would take for quantized are those that are.

    It skips a linear whose name starts or ends with one of `skipped`.
    """
    quantized = {name.removesuffix(".absmax") for name in names if name.endswith(".absmax")}
    problems = []
    for name in sorted(name for name in names if name.endswith("_proj.weight")):
        module = name.removesuffix(".weight")
        skips = any(module.startswith(one) or module.endswith(one) for one in skipped)
        if skips == (name in quantized):
            problems.append(f"config.json: llm_int8_skip_modules is wrong for {module}")
    return problems


def _quantization(where: str, block: Mapping[str, Any], wanted: ExpectedQuantization) -> list[str]:
    fmt, kv = wanted.fmt, wanted.kv
    expected: dict[str, Any] = {
        "quant_algo": fmt.quant_algo,
        "kv_cache_quant_algo": None if kv is None else kv.quant_algo,
    }
    if fmt.weight == "int4":
        scaled = fmt.algorithm == "awq"
        expected |= {"group_size": wanted.group, "has_zero_point": False}
        expected |= {"pre_quant_scale": scaled}
    if fmt.weight == "nvfp4":
        expected["group_size"] = 16
        if fmt.algorithm == "awq":
            expected |= {"has_zero_point": False, "pre_quant_scale": True}
    if fmt.low_rank:
        expected["lora_rank"] = fmt.low_rank
    return _differences(where, block, expected)


def _differences(where: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    return [
        f"{where}: {key} is {reprlib.repr(found.get(key))}, not {reprlib.repr(value)}"
        for key, value in expected.items()
        if found.get(key) != value
    ]
