"""Stage folders, which are written once and finished by a manifest.

A stage folder is finished when it holds manifest.json, which is written last, by an atomic rename.
While a folder is being written, an in-progress marker exists beside it, which distinguishes an
interrupted stage from files of the user.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.workdir.records import how_to_remake, is_manifest, read_progress_file

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
HASH_THREADS = 16  # files hashed at once, to hide the latency of network file systems
RECORDED_PACKAGES = ("nemo_vlm_ptq", "torch", "transformers", "megatron-core", "nvidia-modelopt")


def in_progress_marker(folder: Path) -> Path:
    """Return the path of the file that exists while a stage folder is being written."""
    return folder.with_name(f".{folder.name}.being-written")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a stage folder, or return None if it is not finished.

    Raises:
        UserError: the manifest is truncated or was written by another tool.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        manifest = None
    if not is_manifest(manifest):
        raise UserError(
            f"{path} is not a manifest written by nemo-vlm-ptq; choose another workdir, or, if "
            f"nothing in {folder} is yours: rm -r {shlex.quote(str(folder))}"
        )
    return manifest


def require_manifest(folder: Path, stage: str) -> dict[str, Any]:
    """Read the manifest of a stage folder that another stage needs.

    Args:
        folder: the stage folder.
        stage: the stage that writes it.

    Raises:
        UserError: the folder is not finished.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} is not finished; run the stage {stage!r} first")
    return manifest


def is_finished(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Return whether the stage folder is finished and was made with exactly these settings.

    Raises:
        UserError: the folder was made with other settings, or holds files of other origin.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        _require_settings(folder, manifest["settings"], json.loads(json.dumps(dict(settings))))
        for name in manifest["files"]:
            if not (folder / name).is_file():
                stage = manifest["stage"]
                raise UserError(f"{folder / name} is missing; {how_to_remake(folder, stage)}")
        return True
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, expected a folder; choose another workdir")
    if folder.is_dir() and any(folder.iterdir()) and not in_progress_marker(folder).exists():
        raise UserError(
            f"output folder {folder} exists and was not finished by nemo-vlm-ptq; choose another "
            f"workdir, or, if nothing in it is yours: rm -r {shlex.quote(str(folder))}"
        )
    return False


def _require_settings(folder: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Reject a folder made with other settings; name a recipe value before an input hash."""
    changed = [key for key in sorted({*saved, *current}) if saved.get(key) != current.get(key)]
    if not changed:
        return
    key = min(changed, key=lambda key: _is_hash(current.get(key)))
    difference = f"{key}={saved.get(key)!r}, the recipe has {current.get(key)!r}"
    if _is_hash(current.get(key)):
        difference = f"different {key}"
    raise UserError(
        f"{folder} exists and was made with {difference}; choose another workdir, or "
        f"remove it: rm -r {shlex.quote(str(folder))}"
    )


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def begin_stage(folder: Path, settings: Mapping[str, Any]) -> None:
    """Create the stage folder and its in-progress marker.

    Remove what an interrupted run left, unless its progress record has the same settings.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    in_progress_marker(folder).touch()
    if folder.exists() and read_progress(folder, settings) is None:
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)


def discard_stage(folder: Path) -> None:
    """Remove a finished stage folder, such that an interruption leaves an unfinished one."""
    in_progress_marker(folder).touch()
    (folder / MANIFEST).unlink()
    shutil.rmtree(folder)


def read_progress(folder: Path, settings: Mapping[str, Any]) -> Any:
    """Read the progress record of an unfinished stage with the same settings, or return None."""
    saved = read_progress_file(folder / PROGRESS)
    is_same = saved.get("settings") == json.loads(json.dumps(settings))
    return saved.get("record") if is_same else None


def write_progress(
    folder: Path,
    settings: Mapping[str, Any],
    record: Any,
    sha256: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the progress record of an unfinished stage; `finish_stage` removes it.

    Args:
        folder: the stage folder.
        settings: what the stage depends on.
        record: what is done.
        sha256: of the files that it is about, by relative name.
    """
    saved = {"settings": dict(settings), "record": record, "sha256": dict(sha256)}
    write_json(folder / PROGRESS, saved)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if path.stat().st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
                digest.update(pages)
    return digest.hexdigest()


def hash_manifest(folder: Path) -> str:
    """Return the sha256 of a folder's manifest, which identifies all its files."""
    return hash_file(folder / MANIFEST)


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    versions = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def hash_files(
    folder: Path, names: Iterable[str], known: Mapping[str, str] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
    """Return the size and sha256 of files that this rank wrote, by relative name.

    Args:
        folder: the stage folder.
        names: relative file names.
        known: sha256 of files that were hashed while they were written.

    Raises:
        UserError: a file is not there any more.
    """

    def describe(name: str) -> dict[str, Any]:
        path = folder / name
        try:
            return {"bytes": path.stat().st_size, "sha256": known.get(name) or hash_file(path)}
        except FileNotFoundError:
            line = f"{path} was removed after it was written; run the same command again"
            raise UserError(line) from None

    ordered = sorted(names)
    with ThreadPoolExecutor(HASH_THREADS) as executor:  # hashing releases the interpreter lock
        return dict(zip(ordered, executor.map(describe, ordered), strict=True))


def finish_stage(
    folder: Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    files: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Write the manifest, then remove the in-progress marker and the progress record.

    Args:
        folder: the stage folder.
        stage: its stage.
        settings: recipe values and input hashes that it was made with.
        files: from `hash_files`, of all ranks.
        facts: values that later stages and the report read.

    Raises:
        UserError: a file is not there any more.
    """
    manifest = {
        "stage": stage,
        "settings": dict(settings),
        "versions": package_versions(),
        "bytes": sum(file["bytes"] for file in files.values()),
        "facts": dict(facts),
        "files": dict(sorted(files.items())),
    }
    for name, file in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            raise UserError(
                f"{path} was removed or changed while {stage!r} ran; run the same command again"
            )
    write_json(folder / MANIFEST, manifest)
    in_progress_marker(folder).unlink(missing_ok=True)
    (folder / PROGRESS).unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Write tensors to a safetensors file whose permissions follow the umask."""
    from safetensors.torch import save_file

    separate = {}
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous().cpu()
        if (storage := tensor.untyped_storage().data_ptr()) in seen:
            tensor = tensor.clone()  # save_file rejects tensors that share memory
        seen.add(storage)
        separate[name] = tensor
    save_file(separate, path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def read_json(path: Path) -> Any:
    """Read a JSON file of the workdir, a mapping.

    Raises:
        UserError: it is damaged.
    """
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged; remove it and run the same command again")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, through a temporary file and a rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=False) + "\n")
    os.replace(temporary, path)
