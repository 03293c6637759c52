"""config.json of a TensorRT-LLM checkpoint: what its loader needs, refuses, or would misread.

Read from TensorRT-LLM 1.2 (models/modeling_utils, models/llama, models/phi3, quantization).
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

SIZES = (
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size",
    "intermediate_size", "head_size", "vocab_size", "max_position_embeddings",
)  # fmt: skip
CONFIG_KEYS = (
    "architecture", "dtype", "logits_dtype", *SIZES, "norm_epsilon", "hidden_act",
    "position_embedding_type", "use_parallel_embedding", "embedding_sharding_dim", "mapping",
    "quantization",
)  # fmt: skip
QUANTIZATION_KEYS = {
    "quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val",
    "use_meta_recipe", "has_zero_point", "pre_quant_scale", "exclude_modules",
}  # fmt: skip
MAPPING_KEYS = ("world_size", "tp_size", "pp_size")
# quant_algo -> sizes of a group that it can have; empty: it has no groups
ALGORITHMS: dict[str | None, tuple[int, ...]] = {
    None: (),
    "FP8": (),
    "W8A8_SQ_PER_CHANNEL": (),
    "W4A16_AWQ": (64, 128),
    "W4A8_AWQ": (128,),
    "NVFP4": (16,),
}
PADDED_MULTIPLES = {
    "W4A16_AWQ": 64,
    "W4A8_AWQ": 128,
}  # features that a rank of such a linear is padded to
KV_ALGORITHMS = (None, "FP8", "INT8")
# key -> what it may be in each architecture
ARCHITECTURE_VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "LlamaForCausalLM": {
        "hidden_act": ("silu",),
        "position_embedding_type": ("rope_gpt_neox",),
    },
    "Phi3ForCausalLM": {
        "hidden_act": ("swiglu",),
        "position_embedding_type": ("rope_gpt_neox", "long_rope"),
    },
}
COMMON_VALUES = {
    "dtype": ("bfloat16", "float16", "float32"),
    "logits_dtype": ("float16", "float32"),
    "use_parallel_embedding": (True, False),
    "embedding_sharding_dim": (0, 1),
}
# Each of these would ask for other tensors than the contract lists.
FEATURES = ("attn_bias", "mlp_bias", "bias", "lm_head_bias", "residual_mlp",
            "remove_duplicated_kv_heads")  # fmt: skip
LONG_ROPE = ("longrope_scaling_short_factors", "longrope_scaling_long_factors")


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization block; null is 16 bit."""
    return config["quantization"] or {}


def check_config(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the keys and values, one line each."""
    try:
        found = _check_keys(config) or _check_words(config)
        found = found or [*_check_sizes(config), *_check_quantization(config), *_check_rope(config)]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        found = [f"a value is of the wrong kind: {error}"]
    return [f"config.json: {problem}" for problem in found]


def _check_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys that are missing, and sizes that are no sizes."""
    problems = [f"{key} is missing" for key in CONFIG_KEYS if key not in config]
    if problems:
        return problems
    numbers = {key: config[key] for key in SIZES}
    for key in sorted(set(config["mapping"]) ^ set(MAPPING_KEYS)):
        problems.append(f"mapping.{key} is missing or not portable")
    numbers |= {f"mapping.{key}": value for key, value in config["mapping"].items()}
    for key, value in numbers.items():
        if type(value) is not int or value < 1:
            problems.append(f"{key} is {reprlib.repr(value)}, not a number above 0")
    for key in sorted(set(quantization_of(config)) - QUANTIZATION_KEYS):
        problems.append(f"quantization.{key} is refused by TensorRT-LLM")
    return problems


def _check_words(config: Mapping[str, Any]) -> list[str]:
    """Values out of a list, and features that nothing here knows."""
    block = quantization_of(config)
    allowed: dict[str, tuple[tuple[Any, ...], Any]] = {
        key: (values, config[key])
        for key, values in (
            COMMON_VALUES | ARCHITECTURE_VALUES.get(config["architecture"], {})
        ).items()
    }
    allowed["architecture"] = (tuple(ARCHITECTURE_VALUES), config["architecture"])
    allowed["quant_algo"] = (tuple(ALGORITHMS), block.get("quant_algo"))
    allowed["kv_cache_quant_algo"] = (KV_ALGORITHMS, block.get("kv_cache_quant_algo"))
    problems = [
        f"{key} {reprlib.repr(value)} is not known; known: {', '.join(map(str, values))}"
        for key, (values, value) in allowed.items()
        if value not in values
    ]
    experts = config.get("moe") and config["moe"].get("num_experts")
    asked = [key for key in FEATURES if config.get(key)] + (["moe"] if experts else [])
    return problems + [f"{key} asks for tensors that are not known here" for key in asked]


def _check_sizes(config: Mapping[str, Any]) -> list[str]:
    """Sizes that do not fit together, or cannot be cut for the ranks."""
    tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    problems = []
    if config["mapping"]["world_size"] != tp * pp:
        problems.append(f"mapping.world_size is not tp_size * pp_size = {tp * pp}")
    if heads % kv_heads:
        problems.append("num_key_value_heads does not divide num_attention_heads")
    for key in ("num_attention_heads", "intermediate_size"):
        if config[key] % tp:
            problems.append(f"tp_size {tp} does not divide {key} {config[key]}")
    if kv_heads % tp and tp % kv_heads:
        problems.append(f"tp_size {tp} does not share out num_key_value_heads {kv_heads}")
    if config["num_hidden_layers"] % pp:
        problems.append(f"pp_size {pp} does not divide num_hidden_layers")
    if not 0 < config["norm_epsilon"] < 1:
        problems.append(f"norm_epsilon is {config['norm_epsilon']}")
    if config["embedding_sharding_dim"] == 1 and config["hidden_size"] % tp:
        problems.append(f"tp_size {tp} does not divide hidden_size")
    if config["architecture"] == "Phi3ForCausalLM" and pp != 1:
        problems.append("Phi3ForCausalLM has no pipeline parallelism, pp_size must be 1")
    return problems


def _check_quantization(config: Mapping[str, Any]) -> list[str]:
    """Settings under which the loader would drop scales or take a tensor for another."""
    block = quantization_of(config)
    algorithm, kv = block.get("quant_algo"), block.get("kv_cache_quant_algo")
    if algorithm is None:
        return []
    problems = []
    excluded = block.get("exclude_modules")
    if not isinstance(excluded, list) or not all(isinstance(one, str) for one in excluded):
        problems.append("exclude_modules must be a list that names lm_head")
    elif not any(fnmatchcase("lm_head", one) for one in excluded):
        problems.append("exclude_modules must name lm_head: a quantized head is not known here")
    if algorithm == "NVFP4" and kv == "INT8":
        problems.append("kv_cache_quant_algo INT8 does not go with NVFP4; known: FP8, None")
    if algorithm in PADDED_MULTIPLES and block.get("pre_quant_scale") is not True:
        problems.append("pre_quant_scale must be true, or scales are dropped")
    for key in ("has_zero_point", "use_meta_recipe"):
        if block.get(key):
            problems.append(f"{key} asks for tensors that are not known here")
    groups, group = ALGORITHMS[algorithm], block.get("group_size")
    if type(group) is int and group in groups:
        return problems + _check_groups(config, algorithm, group)
    if groups:
        wanted = " or ".join(map(str, groups))
        problems.append(f"group_size of {algorithm} is {group}, it must be {wanted}")
    return problems


def _check_groups(config: Mapping[str, Any], algorithm: str, group: int) -> list[str]:
    """Groups are whole on every rank, and linears as large as the loader pads them to."""
    tp, dim = config["mapping"]["tp_size"], config["head_size"]
    query = config["num_attention_heads"] * dim
    merged = query + 2 * max(config["num_key_value_heads"], tp) * dim
    sizes = {"hidden_size": config["hidden_size"], "intermediate_size": config["intermediate_size"],
             "num_attention_heads * head_size": query}  # fmt: skip
    if algorithm in PADDED_MULTIPLES:
        sizes["rows of attention.qkv"] = merged
        unit = max(PADDED_MULTIPLES[algorithm], group) * tp
        why = f"linears of {algorithm} are padded to it at tp_size {tp}"
        return [f"{key} {size} is no multiple of {unit}; {why}"
                for key, size in sizes.items() if size % unit]  # fmt: skip
    units = dict.fromkeys(sizes, group * tp) | {"hidden_size": group}
    return [
        f"{key} {size} is no multiple of {units[key]}: a group is cut"
        for key, size in sizes.items()
        if size % units[key]
    ]


def _check_rope(config: Mapping[str, Any]) -> list[str]:
    """Rotary settings that the model reads."""
    problems = []
    base, scaling = config.get("rotary_base", 10000.0), config.get("rotary_scaling")
    if not base > 1:
        problems.append(f"rotary_base is {base}")
    if scaling is not None and not {"type", "rope_type"} & set(scaling):
        problems.append("rotary_scaling has no type")
    if config["architecture"] != "Phi3ForCausalLM":
        return problems
    if "rotary_pct" not in config:
        problems.append("rotary_pct is missing; Phi3ForCausalLM reads it")
    named = config["position_embedding_type"] == "long_rope"
    half = config["head_size"] // 2
    for key in LONG_ROPE:
        if (key in config) != named:  # the model goes by the factors, others by the type
            problems.append(f"{key} {'is missing' if named else 'asks for long_rope'}")
        elif named and (len(config[key]) != half or not all(one > 0 for one in config[key])):
            problems.append(f"{key} must hold {half} factors above 0")
    original = config.get("original_max_position_embeddings")
    if named and not (type(original) is int and 0 < original <= config["max_position_embeddings"]):
        problems.append(
            f"original_max_position_embeddings is {original}, "
            f"not between 1 and max_position_embeddings {config['max_position_embeddings']}"
        )
    return problems
