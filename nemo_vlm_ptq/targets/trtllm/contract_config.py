"""Check config.json of a TensorRT-LLM checkpoint: what the loader requires, rejects or misreads.

Source: TensorRT-LLM 1.2 (models/modeling_utils, models/llama, models/phi3, quantization).
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
REQUIRED_KEYS = (
    "architecture", "dtype", "logits_dtype", *SIZES, "norm_epsilon", "hidden_act",
    "position_embedding_type", "use_parallel_embedding", "embedding_sharding_dim", "mapping",
    "quantization",
)  # fmt: skip
QUANTIZATION_KEYS = {
    "quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val",
    "use_meta_recipe", "has_zero_point", "pre_quant_scale", "exclude_modules",
}  # fmt: skip
MAPPING_KEYS = ("world_size", "tp_size", "pp_size")
# quant_algo -> supported group sizes; empty if it has no groups
ALGORITHMS: dict[str | None, tuple[int, ...]] = {
    None: (),
    "FP8": (),
    "W8A8_SQ_PER_CHANNEL": (),
    "W4A16_AWQ": (64, 128),
    "W4A8_AWQ": (128,),
    "NVFP4": (16,),
}
# quant_algo -> multiple that the loader pads a linear's features to, on each rank
PADDED_MULTIPLES = {"W4A16_AWQ": 64, "W4A8_AWQ": 128}
KV_ALGORITHMS = (None, "FP8", "INT8")
# architecture -> key -> supported values
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
# Options that require tensors which the contract does not list.
UNSUPPORTED_OPTIONS = ("attn_bias", "mlp_bias", "bias", "lm_head_bias", "residual_mlp",
                       "remove_duplicated_kv_heads")  # fmt: skip
MAX_SIZE, MAX_WORLD_SIZE = 1 << 40, 1024  # no model or server comes near; bounds what is printed
LONG_ROPE = ("longrope_scaling_short_factors", "longrope_scaling_long_factors")


def get_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the quantization block; empty if it is null, which means 16 bit."""
    return config["quantization"] or {}


def check_config(config: Mapping[str, Any]) -> list[str]:
    """Return the findings about keys and values, one line each."""
    try:
        found = _check_keys(config) or _check_values(config)
        found = found or [*_check_sizes(config), *_check_quantization(config), *_check_rope(config)]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        found = [f"a value has the wrong type: {error}"]
    return [f"config.json: {problem}" for problem in found]


def _check_keys(config: Mapping[str, Any]) -> list[str]:
    """Find missing and unsupported keys, and sizes that are not positive integers."""
    problems = [f"{key} is missing" for key in REQUIRED_KEYS if key not in config]
    if problems:
        return problems
    numbers = {key: config[key] for key in SIZES}
    for key in sorted(set(config["mapping"]) ^ set(MAPPING_KEYS)):
        reason = "is missing" if key in MAPPING_KEYS else "must not be in a portable checkpoint"
        problems.append(f"mapping.{key} {reason}")
    numbers |= {f"mapping.{key}": value for key, value in config["mapping"].items()}
    for key, value in numbers.items():
        limit = MAX_WORLD_SIZE if key.startswith("mapping") else MAX_SIZE
        if type(value) is not int or value < 1:
            problems.append(f"{key} must be a positive integer, got {reprlib.repr(value)}")
        elif value > limit:
            problems.append(f"{key} must be at most {limit}, got {reprlib.repr(value)}")
    for key in sorted(set(get_quantization(config)) - QUANTIZATION_KEYS):
        problems.append(f"TensorRT-LLM rejects the key quantization.{key}; remove it")
    return problems


def _check_values(config: Mapping[str, Any]) -> list[str]:
    """Find values outside their supported set, and options that need unlisted tensors."""
    block = get_quantization(config)
    supported: dict[str, tuple[tuple[Any, ...], Any]] = {
        key: (values, config[key])
        for key, values in (
            COMMON_VALUES | ARCHITECTURE_VALUES.get(config["architecture"], {})
        ).items()
    }
    supported["architecture"] = (tuple(ARCHITECTURE_VALUES), config["architecture"])
    supported["quant_algo"] = (tuple(ALGORITHMS), block.get("quant_algo"))
    supported["kv_cache_quant_algo"] = (KV_ALGORITHMS, block.get("kv_cache_quant_algo"))
    problems = [
        f"unsupported {key} {reprlib.repr(value)}; supported: {', '.join(map(str, values))}"
        for key, (values, value) in supported.items()
        if value not in values
    ]
    experts = config.get("moe") and config["moe"].get("num_experts")
    options = [key for key in UNSUPPORTED_OPTIONS if config.get(key)] + (["moe"] if experts else [])
    return problems + [f"unsupported option {key}" for key in options]


def _check_sizes(config: Mapping[str, Any]) -> list[str]:
    """Find sizes that contradict each other or cannot be sharded for the ranks."""
    tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    problems = []
    if config["mapping"]["world_size"] != tp * pp:
        problems.append(
            f"mapping.world_size must be tp_size * pp_size = {tp * pp}, "
            f"got {config['mapping']['world_size']}"
        )
    if heads % kv_heads:
        problems.append(
            f"num_attention_heads {heads} must be divisible by num_key_value_heads {kv_heads}"
        )
    for key in ("num_attention_heads", "intermediate_size"):
        if config[key] % tp:
            problems.append(f"{key} {config[key]} must be divisible by tp_size {tp}")
    if kv_heads % tp and tp % kv_heads:
        problems.append(
            f"num_key_value_heads {kv_heads} must divide tp_size {tp} or be a multiple of it"
        )
    if config["num_hidden_layers"] % pp:
        problems.append(
            f"num_hidden_layers {config['num_hidden_layers']} must be divisible by pp_size {pp}"
        )
    if not is_number(config["norm_epsilon"]) or not 0 < config["norm_epsilon"] < 1:
        problems.append(f"norm_epsilon must be between 0 and 1, got {config['norm_epsilon']!r}")
    if config["embedding_sharding_dim"] == 1 and config["hidden_size"] % tp:
        problems.append(
            f"hidden_size {config['hidden_size']} must be divisible by tp_size {tp} "
            "with embedding_sharding_dim 1"
        )
    if config["architecture"] == "Phi3ForCausalLM" and pp != 1:
        problems.append(f"Phi3ForCausalLM has no pipeline parallelism: pp_size must be 1, got {pp}")
    return problems


def _check_quantization(config: Mapping[str, Any]) -> list[str]:
    """Find settings with which the loader drops scales or misreads tensors."""
    block = get_quantization(config)
    algorithm, kv = block.get("quant_algo"), block.get("kv_cache_quant_algo")
    if algorithm is None:
        return []
    problems = []
    excluded = block.get("exclude_modules")
    if not isinstance(excluded, list) or not all(isinstance(name, str) for name in excluded):
        problems.append(f"exclude_modules must be a list that includes lm_head, got {excluded!r}")
    elif not any(fnmatchcase("lm_head", pattern) for pattern in excluded):
        problems.append(
            f"exclude_modules must include lm_head, got {excluded}: a quantized head is unsupported"
        )
    if algorithm == "NVFP4" and kv == "INT8":
        problems.append("unsupported kv_cache_quant_algo INT8 with NVFP4; supported: FP8, None")
    if algorithm in PADDED_MULTIPLES and block.get("pre_quant_scale") is not True:
        problems.append(
            f"pre_quant_scale must be true for {algorithm}, got {block.get('pre_quant_scale')}: "
            "otherwise the loader drops the scales"
        )
    for key in ("has_zero_point", "use_meta_recipe"):
        if block.get(key):
            problems.append(f"unsupported option {key}")
    group_sizes, group_size = ALGORITHMS[algorithm], block.get("group_size")
    if type(group_size) is int and group_size in group_sizes:
        return problems + _check_groups(config, algorithm, group_size)
    if group_sizes:
        supported = " or ".join(map(str, group_sizes))
        problems.append(f"group_size of {algorithm} must be {supported}, got {group_size}")
    return problems


def _check_groups(config: Mapping[str, Any], algorithm: str, group_size: int) -> list[str]:
    """Find groups that a shard would split, and linears that the loader would pad."""
    tp, head_size = config["mapping"]["tp_size"], config["head_size"]
    query = config["num_attention_heads"] * head_size
    fused_qkv = query + 2 * max(config["num_key_value_heads"], tp) * head_size
    sizes = {"hidden_size": config["hidden_size"], "intermediate_size": config["intermediate_size"],
             "num_attention_heads * head_size": query}  # fmt: skip
    if algorithm in PADDED_MULTIPLES:
        sizes["rows of attention.qkv"] = fused_qkv
        multiple = max(PADDED_MULTIPLES[algorithm], group_size) * tp
        reason = f"the loader pads linears of {algorithm} to it at tp_size {tp}"
        return [f"{key} {size} must be a multiple of {multiple}: {reason}"
                for key, size in sizes.items() if size % multiple]  # fmt: skip
    multiples = dict.fromkeys(sizes, group_size * tp) | {"hidden_size": group_size}
    return [
        f"{key} {size} must be a multiple of {multiples[key]}: a group of {group_size} "
        "must not be split"
        for key, size in sizes.items()
        if size % multiples[key]
    ]


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_factor(value: Any) -> bool:
    return is_number(value) and value > 0


def _check_rope(config: Mapping[str, Any]) -> list[str]:
    """Find wrong rotary embedding settings."""
    problems = []
    base, scaling = config.get("rotary_base", 10000.0), config.get("rotary_scaling")
    if not is_number(base) or base <= 1:
        problems.append(f"rotary_base must be greater than 1, got {base!r}")
    is_scaling = isinstance(scaling, dict) and bool({"type", "rope_type"} & set(scaling))
    if scaling is not None and not is_scaling:
        problems.append("rotary_scaling must have the key type or rope_type")
    fraction = config.get("rotary_pct", 1.0)
    if not is_number(fraction) or not 0 < fraction <= 1:
        problems.append(f"rotary_pct must be above 0 and at most 1, got {fraction!r}")
    if config["architecture"] != "Phi3ForCausalLM":
        return problems
    if "rotary_pct" not in config:
        problems.append("rotary_pct is missing; Phi3ForCausalLM requires it")
    is_long = config["position_embedding_type"] == "long_rope"
    half = config["head_size"] // 2
    for key in LONG_ROPE:
        # The model decides by the factors, other code by position_embedding_type.
        if (key in config) != is_long:
            problems.append(
                f"{key} {'is missing' if is_long else 'requires position_embedding_type long_rope'}"
            )
        elif is_long and (len(config[key]) != half or not all(map(_is_factor, config[key]))):
            problems.append(f"{key} must hold {half} positive factors, got {len(config[key])}")
    original = config.get("original_max_position_embeddings")
    longest = config["max_position_embeddings"]
    if is_long and not (type(original) is int and 0 < original <= longest):
        problems.append(
            "original_max_position_embeddings must be between 1 and max_position_embeddings "
            f"{longest}, got {original}"
        )
    return problems
