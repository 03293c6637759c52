"""Tell the kinds of model folders apart by the files that they hold."""

from __future__ import annotations

from pathlib import Path


def is_nemo(folder: Path) -> bool:
    """Return whether the folder is a NeMo 2 checkpoint."""
    return (folder / "context" / "io.json").is_file() and not (folder / "config.json").exists()
