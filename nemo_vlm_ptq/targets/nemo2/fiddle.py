"""Serialize calls as Fiddle's JSON, from which NeMo's load_context builds a model.

Implements the format of google/fiddle 0.3 (experimental/serialization.py) without requiring Fiddle:
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
    """Importable object: a function, a class or a dtype."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """Callable with its arguments: plain values, tuples, symbols and nested calls."""

    target: Symbol
    arguments: Mapping[str, Any]


def to_json(root: Call) -> dict[str, Any]:
    """Return a tree of calls as Fiddle's dump_json serializes it."""
    objects: dict[str, Any] = {}
    refcounts: dict[str, int] = {}

    def reference(type_name: str, entry: dict[str, Any]) -> dict[str, str]:
        count = 1 + sum(name.rpartition("_")[0] == type_name for name in objects)
        key = f"{type_name}_{count}"
        objects[key], refcounts[key] = entry, 1
        return {"type": "ref", "key": key}

    def tuple_entry(values: list[Any], path: str | None) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": _pyref("builtins", "tuple"), "items": values}
        entry["metadata"] = None
        return reference("tuple", entry | ({} if path is None else {"paths": [path]}))

    def empty_dict() -> dict[str, str]:
        keys: dict[str, Any] = {"type": _pyref("builtins", "tuple"), "items": [], "metadata": None}
        entry = {"type": _pyref("builtins", "dict"), "items": [], "metadata": keys}
        return reference("dict", entry)

    def metadata(call: Call) -> dict[str, str]:
        names = [[f"Index(index={i})", name] for i, name in enumerate(call.arguments)]
        fields = {
            "fn_or_cls": _pyref(call.target.module, call.target.name),
            "argument_names": tuple_entry(names, None),
            "argument_tags": empty_dict(),
            "argument_history": empty_dict(),
        }
        items = [[f"Attr(name={name!r})", value] for name, value in fields.items()]
        entry = {"type": _pyref(*METADATA), "items": items, "metadata": _pyref(*METADATA)}
        return reference("buildable_traverser_metadata", entry)

    def serialize(value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Symbol):
            return _pyref(value.module, value.name) | {"paths": [path]}
        if isinstance(value, tuple):
            items = [
                [f"Index(index={i})", serialize(item, f"{path}[{i}]")]
                for i, item in enumerate(value)
            ]
            return tuple_entry(items, path)
        if not isinstance(value, Call):
            return {"type": "leaf", "value": value, "paths": [path]}
        items = [
            [f"Attr(name={name!r})", serialize(argument, f"{path}.{name}")]
            for name, argument in value.arguments.items()
        ]
        entry = {"type": _pyref(*CONFIG), "items": items, "metadata": metadata(value)}
        return reference(value.target.name.lower(), entry | {"paths": [path]})

    root_reference = serialize(root, "<root>")
    return {"root": root_reference, "objects": objects, "refcounts": refcounts, "version": VERSION}


def to_tree(value: Any) -> Any:
    """Return a tree of calls as NeMo's readable model.yaml: `_target_` and the arguments."""
    if isinstance(value, Symbol):
        return {"_target_": f"{value.module}.{value.name}", "_call_": False}
    if isinstance(value, Call):
        target = f"{value.target.module}.{value.target.name}"
        arguments = {name: to_tree(argument) for name, argument in value.arguments.items()}
        return {"_target_": target} | arguments
    return [to_tree(item) for item in value] if isinstance(value, tuple) else value


def _pyref(module: str, name: str) -> dict[str, Any]:
    return {"type": "pyref", "module": module, "name": name}
