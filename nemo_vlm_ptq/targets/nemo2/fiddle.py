"""Calls as Fiddle's JSON has them, so that NeMo's load_context builds what they say.

Fiddle itself is not needed: its serialization (google/fiddle 0.3, experimental/serialization.py) is
a table of objects, each with its type, its items, and the paths under which it is reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONFIG = ("fiddle._src.config", "Config")
METADATA = ("fiddle._src.config", "BuildableTraverserMetadata")
VERSION = "0.0.1"


@dataclass(frozen=True)
class Symbol:
    """Something that is imported: a function, a class, a dtype."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """What is called with which arguments: plain values, tuples, symbols, and other calls."""

    target: Symbol
    arguments: Mapping[str, Any]


def to_json(root: Call) -> dict[str, Any]:
    """The tree of calls as Fiddle's dump_json writes it."""
    objects: dict[str, Any] = {}
    refcounts: dict[str, int] = {}

    def refer(hint: str, entry: dict[str, Any]) -> dict[str, str]:
        count = 1 + sum(name.rpartition("_")[0] == hint for name in objects)
        key = f"{hint}_{count}"
        objects[key], refcounts[key] = entry, 1
        return {"type": "ref", "key": key}

    def sequence(values: list[Any], path: str | None) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": _pyref("builtins", "tuple"), "items": values}
        entry["metadata"] = None
        return refer("tuple", entry | ({} if path is None else {"paths": [path]}))

    def empty() -> dict[str, str]:
        none: dict[str, Any] = {"type": _pyref("builtins", "tuple"), "items": [], "metadata": None}
        return refer("dict", {"type": _pyref("builtins", "dict"), "items": [], "metadata": none})

    def describe(call: Call) -> dict[str, str]:
        names = [[f"Index(index={i})", name] for i, name in enumerate(call.arguments)]
        fields = {
            "fn_or_cls": _pyref(call.target.module, call.target.name),
            "argument_names": sequence(names, None),
            "argument_tags": empty(),
            "argument_history": empty(),
        }
        items = [[f"Attr(name={name!r})", value] for name, value in fields.items()]
        entry = {"type": _pyref(*METADATA), "items": items, "metadata": _pyref(*METADATA)}
        return refer("buildable_traverser_metadata", entry)

    def write(value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Symbol):
            return _pyref(value.module, value.name) | {"paths": [path]}
        if isinstance(value, tuple):
            parts = [
                [f"Index(index={i})", write(one, f"{path}[{i}]")] for i, one in enumerate(value)
            ]
            return sequence(parts, path)
        if not isinstance(value, Call):
            return {"type": "leaf", "value": value, "paths": [path]}
        items = [
            [f"Attr(name={name!r})", write(one, f"{path}.{name}")]
            for name, one in value.arguments.items()
        ]
        entry = {"type": _pyref(*CONFIG), "items": items, "metadata": describe(value)}
        return refer(value.target.name.lower(), entry | {"paths": [path]})

    reference = write(root, "<root>")
    return {"root": reference, "objects": objects, "refcounts": refcounts, "version": VERSION}


def to_tree(value: Any) -> Any:
    """The same for people, as NeMo writes model.yaml: `_target_` and the arguments."""
    if isinstance(value, Symbol):
        return {"_target_": f"{value.module}.{value.name}", "_call_": False}
    if isinstance(value, Call):
        target = f"{value.target.module}.{value.target.name}"
        return {"_target_": target} | {key: to_tree(one) for key, one in value.arguments.items()}
    return [to_tree(one) for one in value] if isinstance(value, tuple) else value


def _pyref(module: str, name: str) -> dict[str, Any]:
    return {"type": "pyref", "module": module, "name": name}
