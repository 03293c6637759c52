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


def check_patch_tower(family: str, vision: Any) -> None:
    """Require sizes and layer numbers that a tower over patches can compute with.

    `plan` does not run such a tower: it computes with the sizes of images.

    Args:
        family: name of the family, for messages.
        vision: transformers' config of a tower of Qwen-VL.

    Raises:
        UserError: a value is not one.
    """
    sizes = ("depth", "num_heads", "patch_size", "spatial_merge_size", "temporal_patch_size")
    values = {f"vision_config.{key}": getattr(vision, key) for key in sizes}
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    values["vision_config.hidden_size"] = width
    require_positive(family, values, int)
    if width % (4 * vision.num_heads):  # rotary embeddings of height and width take pairs
        raise UserError(
            f"{family}: vision_config.hidden_size must be a multiple of 4 num_heads "
            f"{vision.num_heads}, got {width}"
        )
    if (window := getattr(vision, "window_size", None)) is not None:
        require_positive(family, {"vision_config.window_size": window}, int)
        if window < vision.patch_size * vision.spatial_merge_size:
            raise UserError(
                f"{family}: vision_config.window_size must be at least patch_size times "
                f"spatial_merge_size {vision.patch_size * vision.spatial_merge_size}, got {window}"
            )
    for key in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        _check_layers(family, key, getattr(vision, key, []), vision.depth)


def _check_layers(family: str, key: str, layers: Any, depth: int) -> None:
    """Require different layers of a tower of `depth` layers."""
    found = list(layers) if isinstance(layers, list | tuple) else [None]
    valid = all(type(layer) is int and 0 <= layer < depth for layer in found)
    if not valid or len(set(found)) < len(found):
        raise UserError(
            f"{family}: vision_config.{key} must be a list of different layers from 0 to "
            f"{depth - 1}, got {shorten(repr(layers))}"
        )


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
