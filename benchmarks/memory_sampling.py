"""Sample the host memory and disk reads of a command's ranks from another process.

Sampling from outside needs no change of the measured code, and misses peaks shorter than the
interval.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_INTERVAL = 0.05  # seconds


@dataclass
class RankMemory:
    """Memory and disk reads of a rank and its child processes, in bytes.

    start: anonymous and shared memory when the measured work started.
    peak: largest sampled anonymous and shared memory.
    disk_reads: process id -> bytes read from disk.
    """

    start: int = 0
    peak: int = 0
    disk_reads: dict[int, int] = field(default_factory=dict)


def non_file_memory(pid: int) -> int:
    """Return the bytes of memory not backed by files; shared pages count proportionally."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # the process has ended
        return 0
    fields = (line.split() for line in lines)
    return sum(1024 * int(field[1]) for field in fields if field[0] in ("Pss_Anon:", "Pss_Shmem:"))


def sample_memory(launcher: psutil.Process, started: bool, ranks: dict[int, RankMemory]) -> None:
    """Update `ranks` with the present memory and disk reads of the launcher's ranks.

    Args:
        launcher: parent process of the ranks.
        started: whether the measured work has started.
        ranks: rank -> its memory.
    """
    for process in launcher.children():
        try:
            rank = ranks.setdefault(int(process.environ()["RANK"]), RankMemory())
            processes = [process, *process.children(recursive=True)]
            memory = sum(non_file_memory(member.pid) for member in processes)
            for member in processes:
                rank.disk_reads[member.pid] = member.io_counters().read_bytes
        except (KeyError, psutil.Error):
            continue  # not a rank, or ended
        rank.peak = max(rank.peak, memory)
        if not started:
            rank.start = memory


def run_sampled(arguments: Sequence[str], folder: Path) -> tuple[float, list[RankMemory]]:
    """Run a command of nemo-vlm-ptq and sample the memory of its ranks.

    Args:
        arguments: arguments of the command.
        folder: output folder; the measured work has started when it exists.

    Returns:
        Seconds of the whole command, and the memory of each rank.

    Raises:
        SystemExit: the command failed.
    """
    command = [sys.executable, "-m", "nemo_vlm_ptq", *arguments]
    ranks: dict[int, RankMemory] = {}
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
    launcher = psutil.Process(process.pid)
    while process.poll() is None:
        sample_memory(launcher, folder.is_dir(), ranks)
        time.sleep(SAMPLE_INTERVAL)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return time.monotonic() - start, [ranks[rank] for rank in sorted(ranks)]
