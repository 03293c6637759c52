"""Commands in sessions of their own, the processes that belong to them, and how they end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

from nemo_vlm_ptq.distributed.launcher import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
TAG = "RUNS_CAMPAIGN"  # environment variable that all processes of a command inherit
PREFIX = "nemo-vlm-ptq: error: "
END_SECONDS = 60.0  # from a signal to the end of a command
RUN_SECONDS = 600.0  # for an undisturbed command on a busy machine
GONE_SECONDS = 10.0  # from the end of a command to that of all its processes


class DefectError(Exception):
    """What is wrong."""


@dataclass(frozen=True)
class Command:
    """A command that has been started; `tag` marks its processes, `err` holds its stderr."""

    process: subprocess.Popen[bytes]
    tag: str
    err: Path

    @property
    def lines(self) -> list[str]:
        """What it wrote to stderr."""
        return self.err.read_text(errors="replace").splitlines()

    @property
    def pids(self) -> dict[int, int | None]:
        """pid -> rank, None for what is no rank, of its living processes."""
        found: dict[int, int | None] = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environ = dict(
                    entry.partition("=")[::2]
                    for entry in (path / "environ").read_bytes().decode().split("\0")
                )
            except (OSError, UnicodeDecodeError):
                continue  # it has ended, or is another user's
            if environ.get(TAG) == self.tag:
                found[int(path.name)] = int(environ["RANK"]) if "RANK" in environ else None
        return found

    def signal(self, number: int, pids: list[int]) -> None:
        """Send a signal to processes that may have ended."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self, seconds: float = RUN_SECONDS) -> int | None:
        """Wait for the end; return the exit code, None if it does not come in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def work(self, seconds: float) -> int | None:
        """Wait until it has used CPU time, whatever the load; return the exit code if it ends."""
        code = self.process.poll()
        while code is None and self._used() < seconds:
            time.sleep(0.05)
            code = self.process.poll()
        return code

    def _used(self) -> float:
        """Return the CPU time in s of its living processes."""
        total = 0.0
        with contextlib.suppress(psutil.Error):
            own = psutil.Process(self.process.pid)
            for one in (own, *own.children(recursive=True)):
                times = one.cpu_times()
                total += times.user + times.system
        return total

    def remains(self) -> list[int]:
        """Return the pids of processes that outlive the command, which are then killed."""
        deadline = time.monotonic() + GONE_SECONDS
        while (pids := [*self.pids]) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.signal(9, pids)
        return pids

    def complaint(self) -> str:
        """Return what is wrong with stderr: a traceback, or more than one error."""
        errors = [line for line in self.lines if line.startswith(PREFIX)]
        if any("Traceback" in line for line in self.lines):
            return f"traceback: {self.lines[-30:]}"
        return f"{len(errors)} errors: {errors}" if len(errors) > 1 else ""


def start(folder: Path, *words: str | Path) -> Command:
    """Start `nemo-vlm-ptq WORDS` with its stderr in a file of a folder."""
    tag = uuid.uuid4().hex
    err = folder / f"{tag}.err"
    with err.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "nemo_vlm_ptq", *map(str, words)],
            cwd=folder,
            env=os.environ | {TAG: tag, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    return Command(process, tag, err)


def check_end(command: Command, code: int | None, *allowed: int) -> None:
    """Raise a DefectError unless a command has ended as it may, without remains or a traceback."""
    remains = command.remains()
    lines = command.lines[-5:]
    if code is None:
        raise DefectError(f"no end in time: {lines}")
    if remains:
        raise DefectError(f"processes {remains} outlive the command")
    if complaint := command.complaint():
        raise DefectError(complaint)
    if code not in allowed:
        raise DefectError(f"exit code {code}: {lines}")
    if code in (1, 2) and (not lines or not lines[-1].startswith(PREFIX)):
        raise DefectError(f"exit code {code} without a last line about it: {lines}")
