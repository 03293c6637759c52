"""Damage to the JSON files of an export."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (None, True, False, 0, 1, 7, -1, 0.5, 1e300, "x", "", [], {}, ["x"])


def pick_file(rng: random.Random, folder: Path, pattern: str) -> Path | None:
    found = sorted(path for path in folder.rglob(pattern) if path.is_file())
    return rng.choice([path for path in found if path.name != "manifest.json"] or [None])


def edit_json(rng: random.Random, folder: Path) -> str | None:
    """Change, remove or add a key at any depth of any JSON file."""
    path = pick_file(rng, folder, "*.json")
    if path is None:
        return None
    content = json.loads(path.read_text())
    places = [one for one in _objects(content) if one]
    if not places:
        return None
    place = rng.choice(places)
    key, action = rng.choice(sorted(place)), rng.choice(("change", "change", "remove", "add"))
    if key == "version":
        return None  # of the package that wrote it: without effect
    if action == "remove":
        del place[key]
    elif action == "add":
        key = rng.choice(("more", "bias", "rope_scaling", "quant_method", "group_size", "_x"))
        place.setdefault(key, rng.choice(VALUES))
    else:
        place[key] = _another(rng, place[key])
    path.write_text(json.dumps(content))
    return f"{path.relative_to(folder)}: {action} {key}: {str(place.get(key))[:40]}"


def repeat_key(rng: random.Random, folder: Path) -> str | None:
    """A key that is there twice: parsers take the first or the last."""
    path = pick_file(rng, folder, "*config.json")
    if path is None:
        return None
    content = json.loads(path.read_text())
    key = rng.choice(sorted(content))
    first = json.dumps({key: _another(rng, content[key])})[1:-1]
    path.write_text("{" + first + "," + json.dumps(content)[1:])
    return f"{path.relative_to(folder)}: {key} twice"


def _objects(value: Any) -> list[dict[str, Any]]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict) else []
    return own + [found for one in inner for found in _objects(one)]


def _another(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float) and rng.random() < 0.7:
        return rng.choice((value + 1, -value, value * 2, float(value) + 0.5, 0))
    if isinstance(value, list) and value and rng.random() < 0.7:
        return rng.choice((value[:-1], value[1:], [*value, value[0]]))
    return rng.choice([one for one in VALUES if one != value])
