"""Checks of config.json values against what a family supports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.input_files import shorten

MAX_INTEGER = 2**31


def require_values(family: str, values: Mapping[str, tuple[Any, Any]]) -> None:
    """Require config values that the parameter map and the decoder of a family stand for.

    Args:
        family: name of the family, for the message.
        values: config key -> (value, the only supported value).

    Raises:
        UserError: a value is not the supported one; the message is about the first.
    """
    for key, (value, supported) in values.items():
        if value != supported:
            raise UserError(f"{family}: {key} is {value!r}; only {supported!r} is supported")


def check_feature_layer(
    family: str, layers: int | list[int], depth: int, key: str = "vision_feature_layer"
) -> None:
    """Require that the vision tower has the hidden states that the features are read from.

    Args:
        family: name of the family, for the message.
        layers: index or indices into the hidden states, which number depth + 1.
        depth: layers of the vision tower.
        key: config key of the index, for the message.

    Raises:
        UserError: an index is out of range.
    """
    for layer in [layers] if isinstance(layers, int) else layers:
        if not -depth - 1 <= layer <= depth:
            raise UserError(
                f"{family}: {key} must be in [{-depth - 1}, {depth}] for a vision tower of "
                f"{depth} layers, got {layer}"
            )


def require_positive(family: str, values: Mapping[str, Any], kind: type[int] | type[float]) -> None:
    """Require positive numbers: integers below 2**31, or finite numbers.

    Args:
        family: name of the family, for the message.
        values: config key -> value.
        kind: int, or float for numbers of either kind.

    Raises:
        UserError: a value is not one; the message is about the first.
    """
    for key, value in values.items():
        is_number = type(value) is int or (kind is float and type(value) is float)
        if not is_number or not 0 < value < (MAX_INTEGER if kind is int else math.inf):
            name = "integer" if kind is int else "number"
            raise UserError(
                f"{family}: {key} must be a positive {name}, got {shorten(repr(value))}"
            )


def check_tower_sizes(family: str, tower: Any) -> None:
    """Require sizes of a vision tower that are positive integers.

    Args:
        family: name of the family, for the message.
        tower: transformers' config of the tower.

    Raises:
        UserError: one is not.
    """
    sizes = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    require_positive(family, {f"vision tower's {key}": getattr(tower, key) for key in sizes}, int)


def check_token_id(family: str, key: str, token: Any) -> None:
    """Require the id of a token. Whether the embedding has it is checked with the data.

    Raises:
        UserError: it is none.
    """
    if type(token) is not int or not 0 <= token < MAX_INTEGER:
        raise UserError(f"{family}: {key} must be the id of a token, got {shorten(repr(token))}")


def check_not_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    """Require a model in 16 bit, in the config and in the configs that it holds.

    Raises:
        UserError: a config describes a quantization.
    """
    for key, value in config.items():
        if key in ("quantization_config", "compression_config") and value:
            method = value.get("quant_method") if isinstance(value, dict) else None
            raise UserError(
                f"{folder}: config.json has a {key} ({method or 'of an unknown method'}): the "
                "model is already quantized; start from one in 16 bit"
            )
        if isinstance(value, dict):
            check_not_quantized(folder, value)
