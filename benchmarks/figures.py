"""Measure the quickstart: wall time, peak memory, sizes, start-up. Print the tables as markdown.

    python benchmarks/figures.py

Runs the quickstart in a new work folder, then again in the finished one. docs/dev/benchmarks.md
lists the results.
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
SAMPLE_INTERVAL = 0.1  # seconds


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished command.

    seconds: wall time.
    peak_bytes: largest sum of the resident memory of all its processes.
    output: its stdout.
    """

    seconds: float
    peak_bytes: int
    output: str


def measure(command: Sequence[str]) -> Run:
    """Run a command and sample the memory of its process tree."""
    start, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=sys.stderr)
        root_process = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _resident_bytes(root_process))
            time.sleep(SAMPLE_INTERVAL)
        out.seek(0)
        output = out.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return Run(seconds=time.monotonic() - start, peak_bytes=peak, output=output)


def _resident_bytes(process: psutil.Process) -> int:
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # ended while it was sampled
    return total


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def lines_of_code(folder: Path) -> int:
    """Return the lines of the Python files below a folder that are neither blank nor comments."""
    lines = (line.strip() for path in folder.rglob("*.py") for line in path.open())
    return sum(bool(line) and not line.startswith("#") for line in lines)


def stage_seconds(work: Path) -> list[tuple[str, float]]:
    """Return (stage, seconds) of every finished stage folder, in the order of writing."""
    paths = sorted(work.rglob("manifest.json"), key=lambda path: path.stat().st_mtime)
    manifests = [json.loads(path.read_text()) for path in paths]
    return [(manifest["stage"], manifest["facts"]["seconds"]) for manifest in manifests]


def main() -> None:
    """Measure the quickstart and print the tables."""
    command = [str(Path(sys.executable).with_name("nemo-vlm-ptq"))]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        quickstart = [*command, "run", "configs/quickstart.yaml", f"workdir={work}"]
        first, second = measure(quickstart), measure(quickstart)
        stages = stage_seconds(work)
        versions = json.loads((work / "statistics" / "manifest.json").read_text())["versions"]
    fastest_help = min(
        (measure([*command, "--help"]) for _ in range(3)), key=lambda run: run.seconds
    )
    report = first.output.split("report:")[0].strip("\n")
    print("# Quickstart figures\n")
    print(f"`benchmarks/figures.py`, {datetime.date.today()}: {os.cpu_count()} cores", end=" ")
    print(f"({platform.machine()}), Python {platform.python_version()},", end=" ")
    print(", ".join(f"{name} {version}" for name, version in versions.items()) + ".\n")
    print("## Report of the first run\n")
    print("```\n" + report + "\n```\n")
    print("| figure | value |\n| --- | --- |")
    print(f"| wall time of the first run | {first.seconds:.0f} s |")
    print(f"| wall time of a second run, all stages finished | {second.seconds:.0f} s |")
    print(f"| peak memory of all processes | {first.peak_bytes / 2**30:.2f} GiB |")
    print(f"| `nemo-vlm-ptq --help` | {fastest_help.seconds:.2f} s |")
    print(f"| environment on disk | {folder_bytes(Path(sys.prefix)) / 1e9:.2f} GB |")
    print(f"| lines of code in nemo_vlm_ptq/ | {lines_of_code(ROOT / 'nemo_vlm_ptq')} |")
    print("\n## Seconds per stage\n\n| stage | seconds |\n| --- | --- |")
    for stage, seconds in stages:
        print(f"| {stage} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
