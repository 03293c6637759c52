"""The contract of a TensorRT-LLM checkpoint: files, names, shapes and dtypes, from its config.json.

TensorRT-LLM itself only warns of a wrong dtype or an extra tensor; here everything must be exact.
Read from TensorRT-LLM 1.2 (modeling_utils, layers/attention, layers/mlp, quantization/layers).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.source import header

Expected = dict[str, tuple[tuple[int, ...], str]]

CONFIG_KEYS = (
    "architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "intermediate_size", "head_size", "vocab_size", "hidden_act",
    "norm_epsilon", "position_embedding_type", "max_position_embeddings", "rotary_base",
    "use_parallel_embedding", "embedding_sharding_dim", "logits_dtype", "mapping", "quantization",
)  # fmt: skip
QUANTIZATION_KEYS = {
    "quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val",
    "use_meta_recipe", "has_zero_point", "pre_quant_scale", "exclude_modules",
}  # fmt: skip
MAPPING_KEYS = {"world_size", "tp_size", "pp_size"}
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
ARCHITECTURES = ("LlamaForCausalLM", "Phi3ForCausalLM")
NVFP4_BLOCK = 16
LONG_ROPE_KEYS = (
    "original_max_position_embeddings", "longrope_scaling_short_factors",
    "longrope_scaling_long_factors",
)  # fmt: skip
ALGORITHMS = (None, "FP8", "W8A8_SQ_PER_CHANNEL", "W4A16_AWQ", "W4A8_AWQ", "NVFP4")
KV_ALGORITHMS = (None, "FP8", "INT8")


def check_contract(folder: Path) -> list[str]:
    """Everything that is wrong with a checkpoint folder, one line each; empty when all is right."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        return [f"config.json cannot be read: {error}"]
    try:
        return _check_config(config) or _check_ranks(folder, config)
    except (TypeError, KeyError, AttributeError, ValueError, ZeroDivisionError) as error:
        return [f"config.json holds a value of the wrong kind: {error}"]


def _check_ranks(folder: Path, config: dict[str, Any]) -> list[str]:
    """Just the rank files that the mapping asks for, each with its tensors."""
    problems = []
    world = config["mapping"]["world_size"]
    wanted = {f"rank{rank}.safetensors" for rank in range(world)}
    present = {path.name for path in folder.glob("*.safetensors")}
    problems += [f"{name} is missing" for name in sorted(wanted - present)]
    problems += [f"{name} does not belong here" for name in sorted(present - wanted)]
    for rank in range(world):
        if f"rank{rank}.safetensors" in present:
            problems += _check_rank(folder / f"rank{rank}.safetensors", config, rank)
    return problems


def _check_config(config: dict[str, Any]) -> list[str]:
    problems = [f"config.json: {key} is missing" for key in CONFIG_KEYS if key not in config]
    problems = problems or _check_words(config)
    return problems or _check_numbers(config)


def _check_words(config: dict[str, Any]) -> list[str]:
    """Keys and values that TensorRT-LLM refuses or does not know."""
    problems = []
    quantization, mapping = config["quantization"], config["mapping"]
    for key in sorted(set(quantization) - QUANTIZATION_KEYS):
        problems.append(f"config.json: quantization.{key} is refused by TensorRT-LLM")
    for key in sorted(set(mapping) ^ MAPPING_KEYS):
        problems.append(f"config.json: mapping.{key} is missing or not portable")
    if quantization.get("quant_algo") not in ALGORITHMS:
        problems.append(f"config.json: quant_algo {quantization.get('quant_algo')!r} is not known")
    if quantization.get("kv_cache_quant_algo") not in KV_ALGORITHMS:
        kv = quantization["kv_cache_quant_algo"]
        problems.append(f"config.json: kv_cache_quant_algo {kv!r} is not known")
    if config["dtype"] not in DTYPES:
        problems.append(f"config.json: dtype {config['dtype']!r} is not known")
    if config["architecture"] not in ARCHITECTURES:
        problems.append(f"config.json: architecture {config['architecture']!r} is not known")
    return problems


def _check_numbers(config: dict[str, Any]) -> list[str]:
    """Sizes that do not fit together, and settings under which scales would be dropped."""
    problems = []
    quantization, mapping = config["quantization"], config["mapping"]
    if mapping["world_size"] != mapping["tp_size"] * mapping["pp_size"]:
        problems.append("config.json: mapping.world_size is not tp_size * pp_size")
    if config["num_hidden_layers"] % mapping["pp_size"]:
        problems.append("config.json: pp_size does not divide num_hidden_layers")
    if config["num_attention_heads"] % mapping["tp_size"]:
        problems.append("config.json: tp_size does not divide num_attention_heads")
    if config["architecture"] == "Phi3ForCausalLM":
        problems += _check_phi(config)
    algorithm = quantization["quant_algo"]
    if algorithm and quantization.get("exclude_modules") != ["lm_head"]:
        problems.append("config.json: exclude_modules must be ['lm_head']")
    if algorithm in ("W4A16_AWQ", "W4A8_AWQ"):
        if quantization.get("pre_quant_scale") is not True:
            problems.append("config.json: pre_quant_scale must be true, or scales are dropped")
        if not quantization.get("group_size"):
            problems.append("config.json: group_size is missing")
    if algorithm == "NVFP4" and quantization.get("group_size") != NVFP4_BLOCK:
        problems.append(f"config.json: group_size must be {NVFP4_BLOCK}")
    return problems


def _check_phi(config: dict[str, Any]) -> list[str]:
    """What TensorRT-LLM's Phi-3 asks for besides."""
    problems = []
    if config["mapping"]["pp_size"] != 1:
        problems.append("config.json: Phi3ForCausalLM has no pipeline parallelism")
    if config["hidden_act"] != "swiglu":
        problems.append("config.json: hidden_act of Phi3ForCausalLM must be swiglu")
    if config["position_embedding_type"] == "long_rope":
        half = config["head_size"] // 2
        for key in LONG_ROPE_KEYS:
            if key not in config:
                problems.append(f"config.json: {key} is missing")
            elif key.endswith("factors") and len(config[key]) != half:
                problems.append(f"config.json: {key} must hold {half} factors")
    return problems


def _check_rank(path: Path, config: dict[str, Any], rank: int) -> list[str]:
    try:
        found = header(path)
    except Exception as error:  # any damage of the file is a finding
        return [f"{path.name} cannot be read: {error}"]
    expected = expected_tensors(config, rank)
    problems = [f"{path.name}: {name} is missing" for name in sorted(set(expected) - set(found))]
    problems += [f"{path.name}: {name} is extra" for name in sorted(set(found) - set(expected))]
    for name in sorted(set(expected) & set(found)):
        shape, dtype = expected[name]
        entry = found[name]
        if tuple(entry["shape"]) != shape:
            problems.append(f"{path.name}: {name} has shape {entry['shape']}, not {list(shape)}")
        if entry["dtype"] != dtype:
            problems.append(f"{path.name}: {name} has dtype {entry['dtype']}, not {dtype}")
    return problems


def expected_tensors(config: dict[str, Any], rank: int) -> Expected:
    """Name -> (shape, safetensors dtype) of one rank's file."""
    tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    stage = rank // tp
    hidden, dtype = config["hidden_size"], DTYPES[config["dtype"]]
    dim, heads, kv = (
        config["head_size"], config["num_attention_heads"], config["num_key_value_heads"],
    )  # fmt: skip
    ffn, phi = config["intermediate_size"] // tp, config["architecture"] == "Phi3ForCausalLM"
    linears = {
        "attention.qkv": ((heads // tp + 2 * -(-kv // tp)) * dim, hidden),
        "attention.dense": (hidden, heads * dim // tp),
        "mlp.fc": (2 * ffn if phi else ffn, hidden),
        "mlp.gate": (ffn, hidden),
        "mlp.proj": (hidden, ffn),
    }
    if phi:
        del linears["mlp.gate"]
    expected: Expected = {}
    for layer in range(config["num_hidden_layers"] // pp):
        prefix = f"transformer.layers.{layer}."
        expected[prefix + "input_layernorm.weight"] = ((hidden,), dtype)
        expected[prefix + "post_layernorm.weight"] = ((hidden,), dtype)
        if config["quantization"].get("kv_cache_quant_algo") is not None:
            expected[prefix + "attention.kv_cache_scaling_factor"] = ((1,), "F32")
        for name, (out, columns) in linears.items():
            for suffix, entry in _linear(config, out, columns).items():
                expected[f"{prefix}{name}.{suffix}"] = entry
    vocab = -(-config["vocab_size"] // tp)
    if stage == 0:
        expected["transformer.vocab_embedding.weight"] = ((vocab, hidden), dtype)
    if stage == pp - 1:
        expected["transformer.ln_f.weight"] = ((hidden,), dtype)
        expected["lm_head.weight"] = ((vocab, hidden), dtype)
    return expected


def _linear(config: dict[str, Any], out: int, columns: int) -> Expected:
    """Suffix -> (shape, dtype) of a linear of `out` outputs and `columns` inputs on a rank."""
    algorithm, dtype = config["quantization"]["quant_algo"], DTYPES[config["dtype"]]
    if algorithm is None:
        return {"weight": ((out, columns), dtype)}
    if algorithm == "FP8":
        return {
            "weight": ((out, columns), "F8_E4M3"),
            "weights_scaling_factor": ((1,), "F32"),
            "activation_scaling_factor": ((1,), "F32"),
        }
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        return {
            "weight": ((out, columns), "I8"),
            "weights_scaling_factor": ((out,), "F32"),
            "activation_scaling_factor": ((1,), "F32"),
            "prequant_scaling_factor": ((columns,), dtype),
        }
    if algorithm == "NVFP4":
        return {
            "weight": ((out, columns // 2), "U8"),
            "weights_scaling_factor": ((out, columns // NVFP4_BLOCK), "F8_E4M3"),
            "weights_scaling_factor_2": ((1,), "F32"),
            "activation_scaling_factor": ((1,), "F32"),
        }
    group = config["quantization"]["group_size"]
    expected: Expected = {
        "weight": ((out // 2, columns), "I8"),
        "weights_scaling_factor": ((out, columns // group), "F32"),
        "prequant_scaling_factor": ((columns,), dtype),
    }
    if algorithm == "W4A8_AWQ":
        expected["weights_scaling_factor_2"] = ((1,), "F32")
        expected["activation_scaling_factor"] = ((1,), "F32")
    return expected
