"""Validate records of the workdir, and name the command that writes a damaged folder again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any


def is_manifest(value: Any) -> bool:
    """Return whether a value has the keys of a manifest, with their types."""
    types = {"stage": str, "settings": dict, "files": dict, "facts": dict}
    if not isinstance(value, dict):
        return False
    if not all(isinstance(value.get(key), kind) for key, kind in types.items()):
        return False
    return all(isinstance(file, dict) and "sha256" in file for file in value["files"].values())


def how_to_remake(folder: Path, stage: str) -> str:
    """Return the command that makes a stage folder again; `stage` is that of its manifest."""
    command = {"solve": "calibrate"}.get(name := stage.split()[0], name)
    start = (
        "python -m nemo_vlm_ptq.nemo.checkpoint" if name == "nemo" else f"nemo-vlm-ptq {command}"
    )
    return f"to make it again: rm -r {shlex.quote(str(folder))} && {start} RECIPE"


def read_progress_file(path: Path) -> dict[str, Any]:
    """Return what `write_progress` wrote; empty if there is nothing, or something else."""
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return saved if isinstance(saved, dict) and isinstance(saved.get("sha256"), dict) else {}
