"""Stage folders: written once, finished by a manifest, never mistaken for whole when they are not.

A folder is done when it holds manifest.json, which is written last by an atomic rename. Beside a
folder that is being written lies a marker, so that an interrupted one can be told from somebody's
own files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nemo_vlm_ptq.errors import UserError

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
HASH_THREADS = 16  # files at a time, whose bytes a file system may have to bring
PACKAGES = ("nemo_vlm_ptq", "torch", "transformers", "megatron-core", "nvidia-modelopt")


def in_progress_marker(folder: Path) -> Path:
    """The file that lies beside a folder while it is being written."""
    return folder.with_name(f".{folder.name}.being-written")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished folder, or None.

    Raises:
        UserError: there is one that this tool did not write, or not whole.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not {"stage", "settings", "files"} <= set(manifest):
        raise UserError(f"{path} is not a manifest of ours; choose another workdir")
    return manifest


def require_manifest(folder: Path, stage: str) -> dict[str, Any]:
    """The manifest of an input folder.

    Raises:
        UserError: the stage before has not finished.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} is not finished; run the stage {stage!r} first")
    return manifest


def is_done(folder: Path, settings: Mapping[str, Any]) -> bool:
    """True when the folder is finished with just these settings.

    Raises:
        UserError: it holds another recipe's result, or files that are not ours.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        before = manifest["settings"]
        now = json.loads(json.dumps(dict(settings)))
        changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        if changed:
            key = min(changed, key=lambda key: _is_hash(now.get(key)))  # a setting tells more
            said = f"{key}={before.get(key)!r}, the recipe says {now.get(key)!r}"
            if _is_hash(now.get(key)):
                said = f"other {key} than there are now"
            raise UserError(
                f"{folder} exists and was made with {said}; "
                "remove the folder or choose another workdir"
            )
        return True
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"{place} is a file where a folder should go; choose another workdir")
    if folder.is_dir() and any(folder.iterdir()) and not in_progress_marker(folder).exists():
        raise UserError(f"output folder {folder} exists and is not ours; choose another workdir")
    return False


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def begin_stage(folder: Path, settings: Mapping[str, Any]) -> None:
    """A folder with the marker beside it.

    What an interrupted run left is removed, unless it recorded its progress with these settings.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    in_progress_marker(folder).touch()
    if folder.exists() and read_progress(folder, settings) is None:
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)


def read_progress(folder: Path, settings: Mapping[str, Any]) -> Any:
    """What an unfinished stage recorded of its progress with just these settings, or None."""
    path = folder / PROGRESS
    if not path.is_file():
        return None
    saved = read_json(path)
    return saved["record"] if saved["settings"] == json.loads(json.dumps(settings)) else None


def write_progress(folder: Path, settings: Mapping[str, Any], record: Any) -> None:
    """Record the progress of an unfinished stage; it counts until the stage is finished."""
    write_json(folder / PROGRESS, {"settings": dict(settings), "record": record})


def hash_file(path: Path) -> str:
    """sha256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def hash_manifest(folder: Path) -> str:
    """sha256 of a folder's manifest: the identity of everything in it."""
    return hash_file(folder / MANIFEST)


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def hash_files(
    folder: Path, names: Iterable[str], known: Mapping[str, str] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
    """Relative name -> bytes and sha256, for files that this rank wrote; some sha256 are known."""

    def sha256(name: str) -> str:
        return known.get(name) or hash_file(folder / name)

    ordered = sorted(names)
    with ThreadPoolExecutor(HASH_THREADS) as hashers:  # hashing lets other threads run
        digests = list(hashers.map(sha256, ordered))
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(ordered, digests, strict=True)
    }


def finish_stage(
    folder: Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    files: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Write the manifest and drop the marker: from now on the folder is done.

    Args:
        folder: the stage's folder.
        stage: its name.
        settings: recipe values and input hashes it was made from.
        files: from `describe`, of all ranks.
        facts: what the stage wants to tell those after it.
    """
    manifest = {
        "stage": stage,
        "settings": dict(settings),
        "versions": versions(),
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "facts": dict(facts),
        "files": dict(sorted(files.items())),
    }
    write_json(folder / MANIFEST, manifest)
    in_progress_marker(folder).unlink()
    (folder / PROGRESS).unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Write a safetensors file that whoever may read the folder can read."""
    from safetensors.torch import save_file

    own = {}
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous().cpu()
        if (memory := tensor.untyped_storage().data_ptr()) in seen:
            tensor = tensor.clone()  # the library refuses tensors that share memory
        seen.add(memory)
        own[name] = tensor
    save_file(own, path, metadata={"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def read_json(path: Path) -> Any:
    """The JSON in a file."""
    return json.loads(path.read_text())


def write_json(path: Path, value: Any) -> None:
    """Write JSON through a temporary file and a rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=False) + "\n")
    os.replace(temporary, path)
