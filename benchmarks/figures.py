"""Measures the quickstart and prints docs/figures.md: wall time, peak memory, sizes, start-up.

    .venv/bin/python benchmarks/figures.py > docs/figures.md

Runs the quickstart in a new work folder, then once more in the finished one. Needs psutil, which
the package brings along.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Run:
    """A finished command: seconds, largest sum of resident memory of its processes, last output."""

    seconds: float
    peak_bytes: int
    output: str


def measure(command: Sequence[str]) -> Run:
    """Run a command and watch the memory of it and of all it starts."""
    start, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=sys.stderr)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _resident(watched))
            time.sleep(0.1)
        out.seek(0)
        output = out.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Run(time.monotonic() - start, peak, output)


def _resident(process: psutil.Process) -> int:
    total = 0
    try:
        for one in [process, *process.children(recursive=True)]:
            total += one.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # it ended while being looked at
    return total


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def lines_of_code(folder: Path) -> int:
    """Lines of the Python files below a folder that are neither blank nor comments."""
    lines = (line.strip() for path in folder.rglob("*.py") for line in path.open())
    return sum(bool(line) and not line.startswith("#") for line in lines)


def timings(work: Path) -> list[tuple[str, float]]:
    """(stage, seconds) of every finished folder, in the order they were written."""
    manifests = sorted(work.rglob("manifest.json"), key=lambda path: path.stat().st_mtime)
    found = [json.loads(path.read_text()) for path in manifests]
    return [(entry["stage"], entry["facts"]["seconds"]) for entry in found]


def main() -> None:
    """Measure and print."""
    command = [str(Path(sys.executable).with_name("nemo-vlm-ptq"))]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        run = [*command, "run", "configs/quickstart.yaml", f"workdir={work}"]
        first, second = measure(run), measure(run)
        stages = timings(work)
        versions = json.loads((work / "statistics" / "manifest.json").read_text())["versions"]
    helped = min((measure([*command, "--help"]) for _ in range(3)), key=lambda r: r.seconds)
    table = first.output.split("report:")[0].strip("\n")
    print("# Figures\n")
    print(f"Printed by `benchmarks/figures.py` on {datetime.date.today()}: {os.cpu_count()} cores")
    print(f"({platform.machine()}), Python {platform.python_version()},", end=" ")
    print(", ".join(f"{name} {version}" for name, version in versions.items()) + ".\n")
    print("## The quickstart, from a new work folder\n")
    print("```\n" + table + "\n```\n")
    print("| what | figure |\n| --- | --- |")
    print(f"| wall time of the first run | {first.seconds:.0f} s |")
    print(f"| wall time of a second run, all stages finished | {second.seconds:.0f} s |")
    print(f"| peak memory, all processes together | {first.peak_bytes / 2**30:.2f} GiB |")
    print(f"| `nemo-vlm-ptq --help` | {helped.seconds:.2f} s |")
    print(f"| environment on disk | {folder_bytes(Path(sys.prefix)) / 1e9:.2f} GB |")
    print(f"| lines of code in nemo_vlm_ptq/ | {lines_of_code(ROOT / 'nemo_vlm_ptq')} |")
    print("\n## Seconds a stage\n\n| stage | seconds |\n| --- | --- |")
    for stage, seconds in stages:
        print(f"| {stage} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
