"""Locks of a workdir: one run at a time writes it, or a format of it.

WORKDIR/.lock holds a file per run, made by its command, or by rank 0 if another launcher started
the ranks. A run of solve, export, verify or build takes the folders of its formats, so that the
array tasks of a Slurm chain work side by side; every other run takes the whole workdir.

The owner touches its file every few seconds. A lock is stale if its process has ended or its pid is
another process's now; on another host, if its file was not touched for STALE_SECONDS while a new
run waits, or if it belongs to an earlier start of the same Slurm job. The files are compared and
written under flock, as far as the file system has it.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.utils.own_files import own, remove_own

LOCK_FOLDER = ".lock"
GUARD = "guard"  # what flock is taken of
TOUCH_SECONDS = 5.0
STALE_SECONDS = 60.0  # also longer than file systems of networks keep attributes
OWNER_KEYS = {"host", "boot", "pids", "pid", "start", "command", "formats", "time", "job"}
FORMAT_STAGES = {"solve", "export", "verify", "build"}  # write folders of their formats alone


def locked_formats(stages: Sequence[str], formats: Sequence[str]) -> list[str]:
    """Return the formats that a run of these stages locks; empty: the whole workdir."""
    return [*formats] if stages and set(stages) <= FORMAT_STAGES else []


@contextlib.contextmanager
def lock_workdir(work: Path, command: str, formats: Sequence[str] = ()) -> Iterator[None]:
    """Create the workdir, and own it, or the folders of formats in it, inside the context.

    Raises:
        UserError: another run owns it, or it cannot be written.
    """
    owner = _describe_self(command, formats)
    path = work / LOCK_FOLDER / f"{uuid.uuid4().hex}.json"
    own(path)
    try:
        _take(path, owner)
    except OSError as error:
        remove_own(path)  # what a full disk left of it
        raise UserError(f"workdir {work} cannot be written: {error.strerror or error}") from None
    released = threading.Event()
    toucher = threading.Thread(target=_keep_touching, args=(path, released), daemon=True)
    toucher.start()
    try:
        yield
    finally:
        released.set()
        toucher.join(TOUCH_SECONDS)
        remove_own(path)
        with contextlib.suppress(OSError):  # the workdir may be gone
            if path.parent.is_dir():
                with _guarded(path.parent):
                    pass  # removes the folder after the last run


def _take(path: Path, owner: dict[str, Any]) -> None:
    """Write the file of a run, unless a run that is not stale has what it needs."""
    seen: dict[Path, tuple[int, float]] = {}  # file of another host -> its time, and since when
    while True:
        waiting = False
        with _guarded(path.parent):
            for other in sorted(path.parent.glob("*.json")):
                holder = _read_owner(other)
                if not _overlap(owner, holder) or _has_ended(holder, owner):
                    continue
                touched = _touched(other)
                if other not in seen and not _is_here(holder, owner):
                    _print(f"{_describe(path.parent.parent, holder)}; waiting for a sign of it")
                before, since = seen.setdefault(other, (touched, time.monotonic()))
                if _is_here(holder, owner) or touched != before:
                    raise UserError(_locked_message(path.parent.parent, holder, other))
                waiting |= time.monotonic() - since < STALE_SECONDS
            if not waiting:
                for other in path.parent.glob("*.json"):
                    holder = _read_owner(other)
                    if other in seen or _has_ended(holder, owner):
                        other.unlink(missing_ok=True)
                path.write_text(json.dumps(owner))
                return
        time.sleep(min(1.0, STALE_SECONDS / 10))


@contextlib.contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """Create a folder, and let one process at a time compare and write the locks in it.

    In the end the folder is removed if it has none.
    """
    guard = _open_guard(folder)
    try:
        yield
        if not any(folder.glob("*.json")):
            (folder / GUARD).unlink()
            folder.rmdir()
    finally:
        guard.close()


def _open_guard(folder: Path) -> IO[str]:
    """Open the guard, alone as far as the file system has flock; it is not a removed one."""
    path = folder / GUARD
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the folder was removed since
            guard = path.open("a")
            with contextlib.suppress(OSError):
                fcntl.flock(guard, fcntl.LOCK_EX)
            if os.path.samestat(path.stat(), os.fstat(guard.fileno())):
                return guard


def _describe_self(command: str, formats: Sequence[str]) -> dict[str, Any]:
    """Return who this process is and what it is about to write."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": _read_text("/proc/sys/kernel/random/boot_id"),
        "pids": _pid_namespace(),
        "pid": pid,
        "start": _start_time(pid),
        "command": command,
        "formats": [*formats],
        "time": datetime.datetime.now().isoformat(sep=" ", timespec="seconds"),
        "job": [os.environ.get(f"SLURM_{key}", "") for key in ("JOB_ID", "RESTART_COUNT")],
    }


def _read_owner(path: Path) -> dict[str, Any]:
    """Read the file of a run; a damaged one is of nobody known, and stale if it is not touched."""
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):
        owner = None
    if isinstance(owner, dict) and set(owner) >= OWNER_KEYS and _has_lists(owner):
        return owner
    return dict.fromkeys(OWNER_KEYS, "unknown") | {"formats": [], "job": ["", ""]}


def _has_lists(owner: dict[str, Any]) -> bool:
    formats, job = owner["formats"], owner["job"]
    lists = isinstance(formats, list) and isinstance(job, list)
    return lists and all(isinstance(name, str) for name in [*formats, *job]) and len(job) == 2


def _overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two runs write the same folders."""
    whole = not one["formats"] or not other["formats"]
    return whole or bool(set(one["formats"]) & set(other["formats"]))


def _is_here(holder: dict[str, Any], owner: dict[str, Any]) -> bool:
    """Return whether a holder's pid means a process that this one can see."""
    return all(holder[key] == owner[key] for key in ("host", "boot", "pids"))


def _has_ended(holder: dict[str, Any], owner: dict[str, Any]) -> bool:
    """Return whether a holder is known to have ended."""
    if _is_here(holder, owner):
        return not holder["start"] or _start_time(holder["pid"]) != holder["start"]
    same_job = bool(owner["job"][0]) and holder["job"][0] == owner["job"][0]
    return same_job and holder["job"] != owner["job"]  # requeued: the earlier start is over


def _start_time(pid: Any) -> str:
    """Return when a process started, in ticks since the boot; empty if there is none."""
    fields = _read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return "" if len(fields) < 20 or fields[0] in "ZX" else fields[19]


def _pid_namespace() -> str:
    """Return the namespace of this process's pids: containers of a host may differ in it."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _touched(path: Path) -> int:
    """Return the time of a file in ns; opened, as network file systems then ask the server."""
    try:
        with path.open() as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return 0


def _keep_touching(path: Path, released: threading.Event) -> None:
    """Touch the file of this run until it is released or gone."""
    while not released.wait(TOUCH_SECONDS):
        try:
            os.utime(path)
        except FileNotFoundError:
            if path.parent.is_dir() and any(path.parent.glob("*.json")) and not released.is_set():
                _print(f"error: another run has taken the workdir {path.parent.parent}")
                os.kill(os.getpid(), signal.SIGTERM)
            return
        except OSError:
            continue  # e.g. a server that does not answer


def _print(line: str) -> None:
    print(f"nemo-vlm-ptq: {line}", file=sys.stderr, flush=True)


def _describe(work: Path, holder: dict[str, Any]) -> str:
    """Return who owns a workdir, or formats in it."""
    what = f"{work} ({', '.join(holder['formats'])})" if holder["formats"] else str(work)
    job = f", Slurm job {holder['job'][0]}" if holder["job"][0] else ""
    place = f"{holder['pid']} on {holder['host']}{job}"
    since = f"{holder['command']}, since {holder['time']}"
    return f"workdir {what} is in use by process {place}: {since}"


def _locked_message(work: Path, holder: dict[str, Any], path: Path) -> str:
    """Return one line that says who owns a workdir, and what to do."""
    return (
        f"{_describe(work, holder)}; wait for it, stop it, or choose another workdir (if it is "
        f"surely gone: rm {shlex.quote(str(path))})"
    )
