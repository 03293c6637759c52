"""Measures calibration against a plain forward and against modelopt's own.

    python benchmarks/calibration.py [--only PART ...] [--json FILE] [--reuse FILE] [--budget S]
                                     [--samples 64] [--more-samples 512] [--text-tokens 448]
                                     [--micro-batch 16] [--repeats 3] [--layers 32] [--scratch DIR]
                                     [--small]

One decoder of LLaVA-1.5-7B's shape with random weights in bf16, on one GPU and on two; --small: a
small one, for a CPU. Samples are 576 image tokens (random features, no tower) in the middle of
text. Three parts, or the points of one, may be asked for: `ours` is observe and solve on 1 rank and
on 2, over data and over tensors; `modelopt` its mtq.quantize on transformers' model (one GPU, and
split by accelerate over two) and on this project's Megatron-core model; `profile` the kernels.

Every point is warmed up on a model of two layers; then everything runs once, then again up to
--repeats times while there is time (--budget: seconds of the whole command); medians are printed,
with the number of runs. Models are fresh for each run of modelopt, and neither their making nor the
compilation of its extensions is counted. Ours goes from files to files, as the stages do, in
--scratch: /dev/shm unless told, where it has room. Numbers go line by line into --json; --reuse
takes those of an earlier part along, which must be of the same machine and sizes. The report is
markdown on stdout; progress is on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from calibration_report import report
from calibration_setting import POINTS, Numbers, Point, Setting, log

import nemo_vlm_ptq
from nemo_vlm_ptq.workdir.store import write_json

HERE = Path(__file__).resolve().parent
MEMORY = Path("/dev/shm")
FULL = {
    "layers": 32,
    "samples": 64,
    "more_samples": 512,
    "text_tokens": 448,
    "micro_batch": 16,
    "repeats": 3,
}
TINY = {
    "layers": 4,
    "samples": 8,
    "more_samples": 16,
    "text_tokens": 32,
    "micro_batch": 2,
    "repeats": 2,
}
PACKAGES = ("torch", "transformers", "nvidia-modelopt", "megatron-core", "accelerate")
PATIENCE = 15.0  # seconds that the last point may take longer than there is time
WEEK = 7 * 24 * 3600.0


def machine() -> dict[str, Any]:
    """What numbers depend on: they are only put together when it is the same."""
    gpus = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        gpus.append(f"{found.name} ({found.total_memory / 2**30:.0f} GiB)")
    versions = {"nemo_vlm_ptq": nemo_vlm_ptq.__version__, "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "gpus": gpus,
        "cores": len(os.sched_getaffinity(0)),
        "memory": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "versions": versions,
    }


def possible_points() -> dict[str, str]:
    """Point -> why it cannot be measured here, or "" when it can."""
    gpus = torch.cuda.device_count()
    why = dict.fromkeys(POINTS, "")
    for name in ("ours-dp2", "ours-tp2", "modelopt-tp2"):
        why[name] = "one GPU" if gpus == 1 else ""
    why["modelopt-split"] = "" if gpus > 1 else "no two GPUs to split it over"
    why["modelopt-tp1"] = "" if gpus == 1 else "TP 2 is measured"
    return why


def chosen_points(only: Sequence[str]) -> tuple[list[Point], dict[str, str]]:
    """Points to measure, in order, and those that were left out, with the reason.

    A point that is asked for by its own name is always measured.
    """
    chosen, left = [], {}
    for name, why in possible_points().items():
        point = POINTS[name]
        if name in only or (point.part in only and not why):
            chosen.append(point)
        elif point.part in only and name != "modelopt-tp1":
            left[name] = why
    return chosen, left


def scratch_home(setting: Setting, wanted: Path | None) -> Path:
    """Where files of the run go: as told, else into memory where four times the weights fit."""
    if wanted is not None:
        wanted.mkdir(parents=True, exist_ok=True)
        return wanted
    needed = 4 * 2 * setting.weights  # in bf16; statistics are nearly twice as large
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > needed:
        return MEMORY
    return Path(tempfile.gettempdir())


def file_system(folder: Path) -> str:
    """Kind of the file system that holds a folder."""
    mounts = psutil.disk_partitions(all=True)
    holding = [one for one in mounts if folder.resolve().is_relative_to(one.mountpoint)]
    return max(holding, key=lambda one: len(one.mountpoint)).fstype if holding else "unknown"


def run_point(point: Point, job: Path, end: float) -> str:
    """Run the ranks of a point; returns why it did not end well, or ""."""
    words = [sys.executable]
    if point.ranks > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
        words += ["--nproc-per-node", str(point.ranks)]
    words += [str(HERE / "calibration_rank.py"), point.name, str(job)]
    threads = max(1, len(os.sched_getaffinity(0)) // point.ranks)
    settings = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    settings |= {"TRANSFORMERS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    process = subprocess.Popen(words, env=settings | os.environ)
    try:
        code = process.wait(end - time.time())
    except subprocess.TimeoutExpired:
        return "stopped, out of time"
    finally:
        if process.poll() is None:
            _end(process)
    return f"ended with {code}" if code else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a launcher and its ranks, which would outlive it."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def measure(points: Sequence[Point], job: dict[str, Any], end: float) -> None:
    """Every point, each with its share of the time that is left.

    Repeats end with the share; a point that takes half of what is left for the others is stopped.
    """
    with tempfile.TemporaryDirectory(dir=job["home"], prefix="calibration-") as scratch:
        for index, point in enumerate(points):
            now = time.time()
            part = point.share / sum(one.share for one in points[index:])
            deadline = now + max(0.0, end - now) * part
            stop = deadline + max(PATIENCE, (end - deadline) / 2)
            file = Path(scratch) / "job.json"
            write_json(file, job | {"scratch": scratch, "deadline": deadline})
            log(f"{point.name} begins, repeats may go on until {time.ctime(deadline)}")
            failed = run_point(point, file, stop) if now < end else "not begun, out of time"
            if failed:
                log(f"{point.name}: {failed}")
                numbers = Numbers(Path(job["numbers"]), point.name)
                numbers.add("failed", what="all that follows", samples=0, failed=failed)


def earlier_lines(path: Path, setup: dict[str, Any]) -> list[dict[str, Any]]:
    """Numbers of an earlier command.

    Raises:
        SystemExit: they are of another machine, or of other sizes.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "setup" and _kind(line) != _kind(setup):
            raise SystemExit(f"{path} is of {_kind(line)}, this is {_kind(setup)}")
    return lines


def _kind(setup: dict[str, Any]) -> dict[str, Any]:
    """What two commands must have in common for their numbers to stand side by side."""
    found, sizes = setup["machine"], setup["setting"]
    same = {"gpus": found["gpus"], "versions": found["versions"]}
    return same | {key: size for key, size in sizes.items() if key != "repeats"}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="measures calibration")
    parts = sorted({point.part for point in POINTS.values()})
    parser.add_argument("--only", nargs="+", choices=[*parts, *POINTS], metavar="PART")
    parser.add_argument("--profile", action="store_true", help="the part `profile` as well")
    for key, value in FULL.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=int, help=f"{value} unless told")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--budget", type=float, default=WEEK, metavar="SECONDS")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--reuse", type=Path, metavar="FILE")
    parser.add_argument("--scratch", type=Path, metavar="DIR")
    return parser.parse_args()


def main() -> None:
    """Measure, and print the report; ends with 1 when something failed."""
    start, wanted = time.time(), options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ranks and files go as well
    sizes = TINY if wanted.small else FULL
    given = {key: getattr(wanted, key) for key in sizes if getattr(wanted, key) is not None}
    setting = Setting(**sizes | given, small=wanted.small)
    only = wanted.only or ["ours", "modelopt"]
    points, left = chosen_points(only + ["profile"] * wanted.profile)
    home = scratch_home(setting, wanted.scratch)
    setup = {
        "machine": machine(),
        "setting": asdict(setting),
        "command": shlex.join(["python", "benchmarks/calibration.py", *sys.argv[1:]]),
        "date": str(datetime.date.today()),
        "files": f"{home} ({file_system(home)})",
        "left": left,
    }
    lines = earlier_lines(wanted.reuse, setup) if wanted.reuse else []
    with tempfile.TemporaryDirectory() as folder:
        path = wanted.json or Path(folder) / "numbers.json"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        Numbers(path, "").add("setup", **setup)
        job = {"setting": asdict(setting), "numbers": str(path.resolve()), "home": str(home)}
        measure(points, job, start + wanted.budget)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    print(report(lines))
    sys.exit(any(line["kind"] == "failed" for line in lines))


if __name__ == "__main__":
    main()
