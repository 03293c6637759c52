"""Read recipes: YAML files or shipped names, overrides, and errors in one line."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from nemo_vlm_ptq.errors import UserError, has_control_characters
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.input_files import is_file, one_line, open_file, shorten
from nemo_vlm_ptq.recipe.schema import Recipe
from nemo_vlm_ptq.recipe.words import explain_key
from nemo_vlm_ptq.targets.registry import supported_targets

FORMER_MODELS = (
    "llava15_13b", "llava15_7b", "phi35_vision", "phi3_vision", "vila15_3b", "vila15_8b",
)  # fmt: skip
FORMER_TARGETS = ("trtllm", "hf")  # of recipes named MODEL_FORMAT
MAX_VALUES = 100_000
YAML_STR, YAML_MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


def recipe_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Return the dotted names of all keys."""
    names = []
    for key, field in model.model_fields.items():
        name = prefix + (field.alias or key)
        names.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += recipe_keys(field.annotation, f"{name}.")
    return names


def make_recipe(tree: Mapping[str, Any]) -> Recipe:
    """Validate a tree of recipe keys.

    Raises:
        UserError: an unknown key (with the nearest known one), a missing one, or an invalid value.
    """
    try:
        return Recipe.model_validate(dict(tree))
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    """Return the first problem of a recipe as one line."""
    problem, known = error.errors()[0], recipe_keys()
    parts = [str(part) for part in problem["loc"] if not isinstance(part, int)]
    key = ".".join(parts)
    if problem["type"] == "extra_forbidden":
        return f"unknown recipe key {shorten(key)!r}{explain_key(key, known)}"
    if key not in known and ".".join(parts[:-1]) in known:
        key = ".".join(parts[:-1])  # pydantic appends the type that it tried
    if problem["type"] == "missing":
        return f"recipe key {key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"recipe key {key!r}: {message} (got {shorten(repr(problem['input']))})"


def shipped_recipes() -> dict[str, Path]:
    """Return name -> file of the recipes in configs/."""
    package = Path(__file__).resolve().parents[1]
    folders = (package.parent / "configs", package / "configs")
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def recipe_file(name: str) -> Path:
    """Return the file of a recipe: a path, or the name of a shipped recipe.

    Raises:
        UserError: neither; lists the shipped names, or those that are similar.
    """
    path, shipped = Path(name), shipped_recipes()
    if is_file(path):
        return path
    if name in shipped:
        return shipped[name]
    near = sorted(difflib.get_close_matches(name, shipped, n=3))
    known = ", ".join([*near, "..."] if near else sorted(shipped))
    raise UserError(f"recipe {shorten(name)!r} is not a file; shipped recipes: {known}")


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, apply `dotted.key=value` overrides, and validate it.

    Raises:
        UserError: an unreadable file, an unknown key (with the nearest known one), or an invalid
            value.
    """
    name, implied = _resolve_deprecated(name)
    path = recipe_file(name)
    with open_file(path) as file:
        content = file.read()
    try:
        tree = yaml.load(content.decode(), _Loader) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must be a mapping of recipe keys")
    for word in [*implied, *overrides]:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{shorten(word)!r} is not an override; expected key=value")
        if has_control_characters(word):  # YAML would take a line end for a space
            raise UserError(f"{shorten(word)!r} has control characters; remove them")
        try:
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UserError(
                f"{shorten(word)!r} is not an override: {shorten(text)!r} is not YAML"
            ) from None
        _assign(tree, key, value)
    return make_recipe(tree)


def _resolve_deprecated(name: str) -> tuple[str, list[str]]:
    """Map the name of a former recipe to the recipe of its model, and overrides."""
    former = former_recipe(name)
    if former is None or is_file(Path(name)):
        return name, []
    model, fmt = former
    targets = [name for name in FORMER_TARGETS if name in supported_targets(FORMATS[fmt])]
    implied = [f"quantize.format={fmt}", f"export.targets=[{','.join(targets)}]"]
    if "RANK" not in os.environ:
        line = f"recipe {name} is deprecated: use {' '.join([model, *implied])}"
        print(f"nemo-vlm-ptq: {line}", file=sys.stderr)
    return model, [*implied, f"workdir=work/{name}"]


def former_recipe(name: str) -> tuple[str, str] | None:
    """Return (model, format) of MODEL_FORMAT, the name of a former recipe, or None."""
    shipped = FORMER_MODELS
    for fmt in sorted(FORMATS, key=len, reverse=True):
        model = name.removesuffix(f"_{fmt}")
        if name not in shipped and model != name and model in shipped:
            return model, fmt
    return None


class _Loader(yaml.SafeLoader):
    """YAML without code or values without end, with unique keys that are strings."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > MAX_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {MAX_VALUES:,} values")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag not in (YAML_STR, YAML_MERGE):
                raise yaml.YAMLError(f"line {line}: key {key.value!r} is not a string")
            if key.value in seen:
                raise yaml.YAMLError(f"line {line}: key {key.value!r} is not unique")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _written_out(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return the number of values of a node with every alias written out.

    Args:
        node: the node.
        sizes: id of a node -> its number, 0 while it is being counted.

    Raises:
        YAMLError: an alias stands for what it is part of.
    """
    key, children = id(node), []
    if key not in sizes:
        sizes[key] = 0
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        sizes[key] = 1 + sum(_written_out(child, sizes) for child in children)
    if not sizes[key]:
        raise yaml.YAMLError(f"line {node.start_mark.line + 1}: an alias that holds itself")
    return sizes[key]


# YAML 1.1 takes numbers such as 5e5 and 1.0e5, without a point or a sign, for text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UserError(f"recipe key {dotted!r}: {key!r} holds a value, not a section")
    tree[last] = value
