"""What ranks hold while they work, seen from outside."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
PAUSE = 0.05  # seconds between two looks at the ranks


@dataclass
class Rank:
    """What was seen of a rank and the helpers it started, in bytes."""

    before: int = 0  # own memory when the work began
    peak: int = 0  # own memory
    disk: dict[int, int] = field(default_factory=dict)  # process -> bytes it had the disk read


def own_memory(pid: int) -> int:
    """Bytes of memory that is not a file's; what processes share is shared out among them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    found = (line.split() for line in lines)
    return sum(1024 * int(w[1]) for w in found if w[0] in ("Pss_Anon:", "Pss_Shmem:"))


def look(parent: psutil.Process, started: bool, ranks: dict[int, Rank]) -> None:
    """Note what the ranks below a launcher hold now; `started`: the work has begun."""
    for process in parent.children():
        try:
            rank = ranks.setdefault(int(process.environ()["RANK"]), Rank())
            family = [process, *process.children(recursive=True)]
            now = sum(own_memory(one.pid) for one in family)
            for one in family:
                rank.disk[one.pid] = one.io_counters().read_bytes
        except (KeyError, psutil.Error):
            continue  # no rank, or gone
        rank.peak = max(rank.peak, now)
        if not started:
            rank.before = now


def watch(words: Sequence[str], folder: Path) -> tuple[float, list[Rank]]:
    """Seconds of a command of this package, and what was seen of its ranks.

    Args:
        words: of the command.
        folder: what it writes; the work has begun when it is there.

    Raises:
        SystemExit: the command failed.
    """
    command = [sys.executable, "-m", "nemo_vlm_ptq", *words]
    ranks: dict[int, Rank] = {}
    begin = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        look(watched, folder.is_dir(), ranks)
        time.sleep(PAUSE)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.monotonic() - begin, [ranks[rank] for rank in sorted(ranks)]
