"""Check that an export's folder holds the files that were written, unchanged, and no others."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.workdir import store


def check_files(folder: Path) -> list[str]:
    """Compare a finished folder with its manifest: names, and the sha256 of every file."""
    listed = store.require_manifest(folder, "export")["files"]
    findings = check_names(folder, listed)
    expected = {name: listed[name] for name in sorted(set(listed) & list_files(folder)[0])}
    for name, entry in store.hash_files(folder, expected).items():
        if entry["sha256"] != expected[name]["sha256"]:
            findings.append(f"{name} was changed after it was written")
    return findings


def check_names(folder: Path, expected: Iterable[str]) -> list[str]:
    """Check that a folder holds exactly these files beside its manifest."""
    files, odd = list_files(folder)
    names = set(expected)
    findings = [f"{name} is not a regular file; remove it or export again" for name in sorted(odd)]
    findings += [f"{name} is missing" for name in sorted(names - files - odd)]
    return findings + [
        f"{name} does not belong to the export; remove it" for name in sorted(files - names)
    ]


def list_files(folder: Path) -> tuple[set[str], set[str]]:
    """Return the names of the regular files below a folder, and those of links and the like."""
    files, odd = set(), set()
    for home, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(home, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                odd.add(str(path.relative_to(folder)))
            elif path.is_file():
                files.add(str(path.relative_to(folder)))
    return files - {store.MANIFEST}, odd


def is_unchanged(folders: Iterable[Path], record: Any, settings: dict[str, Any]) -> bool:
    """Whether a record of verify holds for these exports: it passed, and no file has changed."""
    if not isinstance(record, dict) or not record.get("passed"):
        return False
    return record.get("settings") == settings and not any(map(check_files, folders))
