"""Rope settings of Phi-3 (su) and Phi-3.5 (longrope), with the keys of any transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import Config
from nemo_vlm_ptq.families.decoder import LongRope

LONG_ROPE_TYPES = ("su", "longrope")  # two names of one rope type
FACTOR_KEYS = ("short_factor", "long_factor")
ROPE_KEYS = {"type", "rope_type", "rope_theta", "factor", *FACTOR_KEYS}
ROPE_KEYS |= {"original_max_position_embeddings", "partial_rotary_factor"}


def read_long_rope(config: Config) -> LongRope | None:
    """Return the long rope of a config, None for plain rope.

    Raises:
        UserError: another rope type, an unknown key, or a wrong number of factors.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    check_rope(config, rope)
    if rope_type(rope) not in LONG_ROPE_TYPES:
        return None
    original, ratio = original_max_positions(config), position_ratio(config)
    return LongRope(
        short_factors=tuple(rope["short_factor"]),
        long_factors=tuple(rope["long_factor"]),
        original_max_positions=original,
        attention_factor=math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0,
    )


def check_rope(config: Config, rope: Mapping[str, Any]) -> None:
    """Reject rope settings other than none, su or longrope as published.

    Raises:
        UserError: another rope type, an unknown key, or a wrong number of factors.
    """
    name = rope_type(rope)
    if name not in ("default", *LONG_ROPE_TYPES):
        raise UserError(
            f"phi: rope type is {name!r}; supported: {', '.join(LONG_ROPE_TYPES)}, or none"
        )
    if unknown := sorted(set(rope) - ROPE_KEYS):
        raise UserError(
            f"phi: key rope_scaling.{unknown[0]} is not supported; "
            f"supported: {', '.join(sorted(ROPE_KEYS))}"
        )
    half = config.get("hidden_size", 3072) // config.get("num_attention_heads", 32) // 2
    for key in FACTOR_KEYS if name in LONG_ROPE_TYPES else ():
        count = len(rope.get(key) or ())
        if count != half:
            raise UserError(
                f"phi: rope_scaling.{key} must have head_dim / 2 = {half} factors, got {count}"
            )


def to_transformers_5(config: Config, rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope settings with the keys and the type name of transformers 5."""
    name = rope_type(rope)
    original = original_max_positions(config)
    converted = {key: value for key, value in rope.items() if key != "type"}
    converted["rope_type"] = "longrope" if name in LONG_ROPE_TYPES else name
    converted.setdefault("original_max_position_embeddings", original)
    converted["factor"] = position_ratio(config)
    return converted


def rope_type(rope: Mapping[str, Any]) -> str:
    """Return the rope type, which configs have under either of two keys."""
    return str(rope.get("rope_type") or rope.get("type") or "default")


def original_max_positions(config: Config) -> int:
    """Return the length of the longest sequence with short factors."""
    return int(config.get("original_max_position_embeddings", 4096))


def position_ratio(config: Config) -> float:
    """Return the length of the longest sequence over that of the longest with short factors."""
    return float(config.get("max_position_embeddings", 4096) / original_max_positions(config))
