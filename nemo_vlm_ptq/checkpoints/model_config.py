"""Changes to a model's config.json: values of the recipe, and the dtype of the weights."""

from __future__ import annotations

from typing import Any


def merge_config(config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the config with some values replaced, recursively in nested configs."""
    merged = dict(config)
    for key, value in values.items():
        nested = merged.get(key)
        if isinstance(nested, dict) and isinstance(value, dict):
            value = merge_config(nested, value)
        merged[key] = value
    return merged


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a copy of the config, nested configs included, whose dtype entries are `dtype`.

    Configs without a dtype get none.
    """
    changed = dict(config)
    for key, value in config.items():
        if isinstance(value, dict):
            changed[key] = with_dtype(value, dtype)
        elif key in ("dtype", "torch_dtype") and value is not None:
            changed[key] = dtype
    return changed
