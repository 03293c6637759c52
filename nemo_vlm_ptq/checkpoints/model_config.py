"""A model's config.json, changed: with a recipe's values, in a dtype."""

from __future__ import annotations

from typing import Any


def merge_config(config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A config with some values in place of its own, key by key also in the configs inside it."""
    changed = dict(config)
    for key, value in values.items():
        inner = changed.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            value = merge_config(inner, value)
        changed[key] = value
    return changed


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config, and the configs inside it, whose dtypes are this one where they have any."""
    changed = dict(config)
    for key, value in config.items():
        if isinstance(value, dict):
            changed[key] = with_dtype(value, dtype)
        elif key in ("dtype", "torch_dtype") and value is not None:
            changed[key] = dtype
    return changed
