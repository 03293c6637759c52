"""Registry of model families.

Each module of this package that defines FAMILY is a family; the others are helpers.
"""

from __future__ import annotations

import os
import pkgutil
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.checkpoints.huggingface import read_json_object
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import ModelFamily
from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.input_files import is_folder

__all__ = ["FAMILIES", "Decoder", "ModelFamily", "find_family", "read_config"]

NEAR = 0.7  # similarity of two names, from 0 to 1
_MODULES = [import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
FAMILIES: dict[str, ModelFamily] = {
    module.FAMILY.name: module.FAMILY for module in _MODULES if hasattr(module, "FAMILY")
}


def read_config(folder: Path) -> dict[str, Any]:
    """Return the parsed config.json of a model folder.

    Raises:
        UserError: the folder or its config.json does not exist, or is not JSON.
    """
    if not is_folder(folder):
        raise UserError(f"model folder {folder} does not exist")
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise UserError(f"{folder} has no config.json; expected a Hugging Face model folder")
    return read_json_object(path)


def find_family(config: dict[str, Any], name: str = "auto") -> ModelFamily:
    """Return the family with a name, or that of the architecture of a config.

    Args:
        config: the parsed config.json.
        name: name of the family; "auto" to find it by architecture.

    Raises:
        UserError: the name or the architecture is not supported; lists those that are.
    """
    if name != "auto":
        if name not in FAMILIES:
            raise UserError(
                f"family {name!r} is not supported; supported: auto, {', '.join(FAMILIES)}"
            )
        return FAMILIES[name]
    architectures = config.get("architectures") or ["none"]
    for key in ("model_type", "torch_dtype", "dtype"):
        if not isinstance(config.get(key), str | None):
            raise UserError(f"config.json: {key} must be a string, got {config[key]!r}")
    if not isinstance(architectures, list):
        raise UserError(f"config.json: architectures must be a list, got {architectures!r}")
    architecture = architectures[0]
    vision = config.get("vision_config")
    tower = vision.get("model_type") if isinstance(vision, dict) else None
    found = [one for one in FAMILIES.values() if architecture in one.architectures]
    for family in found:
        if tower is not None and family.tower == tower:
            return family
    if found:
        return found[0]
    raise UserError(_unsupported(str(architecture)))


def _unsupported(architecture: str) -> str:
    """Return what to say of an architecture that no family has."""
    owners: dict[str, ModelFamily] = {}
    for family in FAMILIES.values():
        for name in family.architectures:
            owners.setdefault(name, family)
    hint = ""
    for name, family in owners.items():
        if other := dict(family.other_repositories).get(architecture):
            hint = f"take the repository whose class is {name}: {other}; "
    stems = {name.partition("For")[0]: name for name in owners}
    for stem in get_close_matches(architecture.partition("For")[0], stems, n=1, cutoff=NEAR):
        nearest = stems[stem]
        hint = hint or f"the nearest is {nearest} (family {owners[nearest].name}); "
    return f"architecture {architecture!r} is not supported; {hint}supported: {', '.join(owners)}"
