"""Checks of config.json values against what a family supports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.errors import UserError


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
