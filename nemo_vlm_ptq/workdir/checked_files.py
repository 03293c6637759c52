"""Files of the workdir, compared before they are read with the sha256 of when they were written.

A finished folder's manifest lists the sha256 of all its files, and the progress record of an
unfinished one those that later steps read. A process hashes a file once, unless it changes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.workdir import store
from nemo_vlm_ptq.workdir.records import how_to_remake, read_progress_file

STAGES = {"scales": "solve", "statistics": "observe"}  # of unfinished folders with a record
Version = tuple[int, int, int]  # of a file: inode, size, time in ns


def checked_file(folder: Path, name: str) -> Path:
    """Return the path of a file that is as it was written; one that nothing lists is not checked.

    Args:
        folder: the stage folder.
        name: relative file name.

    Raises:
        UserError: the file is missing or was changed; says how to make it again.
    """
    path = folder / name
    expected = read_hashes(folder).get(name)
    if expected is None:
        return path
    version = _version(path)
    if version is None or _hash(path, version) != expected:
        manifest = store.read_manifest(folder)
        stage = STAGES.get(folder.name, "export") if manifest is None else manifest["stage"]
        what = "is missing" if version is None else "was changed after it was written"
        raise UserError(f"{path} {what}; {how_to_remake(folder, stage)}")
    return path


def check_folder(folder: Path, stage: str) -> None:
    """Check all files of a finished stage folder.

    Raises:
        UserError: it is not finished, or a file is missing or was changed.
    """
    names = store.require_manifest(folder, stage)["files"]
    with ThreadPoolExecutor(store.HASH_THREADS) as threads:
        for _ in threads.map(lambda name: checked_file(folder, name), names):
            pass


def read_hashes(folder: Path) -> dict[str, str]:
    """Return file -> sha256 as it was written, from the manifest or the progress record."""
    for name in (store.MANIFEST, store.PROGRESS):
        version = _version(folder / name)
        if version is not None:
            return _read_hashes(folder / name, version)
    return {}


def _version(path: Path) -> Version | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _read_hashes(path: Path, version: Version) -> dict[str, str]:
    if path.name == store.MANIFEST:
        manifest = store.read_manifest(path.parent)
        return {} if manifest is None else {k: f["sha256"] for k, f in manifest["files"].items()}
    hashes: dict[str, str] = read_progress_file(path).get("sha256", {})
    return hashes


@lru_cache(maxsize=1 << 16)
def _hash(path: Path, version: Version) -> str:
    return store.hash_file(path)
