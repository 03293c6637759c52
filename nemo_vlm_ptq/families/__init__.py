"""Model families: facts, one file each; a file that defines FAMILY is one."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.checkpoints.huggingface import read_json_object
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import Decoder, ModelFamily

__all__ = ["FAMILIES", "Decoder", "ModelFamily", "find_family", "read_config"]

_MODULES = [import_module(f"{__name__}.{entry.name}") for entry in pkgutil.iter_modules(__path__)]
FAMILIES: dict[str, ModelFamily] = {
    module.FAMILY.name: module.FAMILY for module in _MODULES if hasattr(module, "FAMILY")
}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        UserError: no folder, no config, or no JSON.
    """
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; is it a Hugging Face model folder?")
    return read_json_object(path)


def find_family(config: dict[str, Any], name: str = "auto") -> ModelFamily:
    """The family of a config, by its architecture unless named.

    Raises:
        UserError: unknown name or architecture; lists the supported ones.
    """
    if name != "auto":
        if name not in FAMILIES:
            raise UserError(f"unknown family {name!r}; known: auto, {', '.join(FAMILIES)}")
        return FAMILIES[name]
    found = (config.get("architectures") or ["none"])[0]
    for family in FAMILIES.values():
        if found in family.architectures:
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    raise UserError(f"architecture {found!r} is not supported; supported: {known}")
