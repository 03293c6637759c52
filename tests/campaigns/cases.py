"""Copies of inputs that campaigns/sources.py damages, and what all kinds of damage share.

A kind of damage is a function (random numbers, case) -> what was done, or None where the case has
nothing of that kind. What was done names the file, key or tensor that a message should name.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 1842767\n"
RAW = "raw:"  # marks text that is written into JSON as it is
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 0.5, -0.0, 1e300, 2**31, 2**64, 10**30, "x", "", "8", "1e9",
    "\ud800", "a\nb", "default", [], {}, ["x"], [1, 2, 3], [[]], {"a": 1}, [None], [2**40, 2**40],
    *(RAW + word for word in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999")),
    RAW + "9" * 50,
)  # fmt: skip


@dataclass
class Case:
    """Copies to be damaged: `model/`, `data/`, and a recipe with its overrides in `folder`."""

    folder: Path
    tree: dict[str, Any]
    overrides: list[str] = field(default_factory=list)
    command: str = "plan"

    @property
    def model(self) -> Path:
        """The model folder."""
        return self.folder / "model"

    @property
    def data(self) -> Path:
        """The data folder."""
        return self.folder / "data"

    @property
    def recipe(self) -> Path:
        """The recipe, written after most damages, from `tree`."""
        return self.folder / "recipe.yaml"


Damage = Callable[[random.Random, Case], str | None]


def pick(rng: random.Random, folder: Path, *patterns: str) -> Path | None:
    """Return one of the regular files of a folder."""
    found = {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    return rng.choice(sorted(found) or [None])


def dump(content: Any) -> str:
    """Return JSON in which strings that start with RAW are raw text."""
    return re.sub(rf'"{RAW}([^"]*)"', r"\1", json.dumps(content))


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value at any depth."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    own = [(value, key) for key in keys]
    return own + [found for key in keys for found in nodes(value[key])]
