"""Measure calibration against the forward pass and against modelopt.

    python benchmarks/calibration.py [--only PART ...] [--json FILE] [--reuse FILE] [--budget S]
                                     [--samples 64] [--more-samples 512] [--text-tokens 448]
                                     [--micro-batch 16] [--repeats 3] [--layers 32] [--scratch DIR]
                                     [--small]

Runs the decoder of LLaVA-1.5-7B with random bf16 weights on one GPU and on two; --small runs a
small decoder, for CPUs. A sample is 576 image tokens (random features, no vision tower) in the
middle of text. --only selects parts or configs: part `package` is observe and solve of this package
on 1 rank, DP 2 and TP 2; `modelopt` is mtq.quantize on transformers' model (one GPU, and split over
two by accelerate) and on this package's Megatron-core model; `profile` lists kernels.

Every config is warmed up on two layers, then each case runs once, then up to --repeats times within
--budget, the seconds of the whole command. The report lists medians and numbers of runs. modelopt
gets a new model for each run; building it and compiling CUDA extensions are not timed. This package
runs from files to files, as its stages do, in --scratch (/dev/shm if large enough). Results
are appended to --json line by line; --reuse includes those of an earlier command, on the same
machine and with the same sizes. The report is markdown on stdout, progress is on stderr.
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
from calibration_common import CONFIGS, BenchmarkConfig, Workload, log
from calibration_report import make_report
from calibration_timing import ResultsFile

import nemo_vlm_ptq
from nemo_vlm_ptq.workdir.store import write_json

BENCHMARKS = Path(__file__).resolve().parent
TMPFS = Path("/dev/shm")
FULL_SIZES = {
    "layers": 32,
    "samples": 64,
    "more_samples": 512,
    "text_tokens": 448,
    "micro_batch": 16,
    "repeats": 3,
}
SMALL_SIZES = {
    "layers": 4,
    "samples": 8,
    "more_samples": 16,
    "text_tokens": 32,
    "micro_batch": 2,
    "repeats": 2,
}
RECORDED_PACKAGES = ("torch", "transformers", "nvidia-modelopt", "megatron-core", "accelerate")
GRACE_SECONDS = 15.0  # by which the last config may exceed the budget
UNLIMITED_SECONDS = 7 * 24 * 3600.0


def describe_machine() -> dict[str, Any]:
    """Return hardware and versions; results are combined only if GPUs and versions are the same."""
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)")
    versions = {"nemo_vlm_ptq": nemo_vlm_ptq.__version__, "cuda": torch.version.cuda}
    for name in RECORDED_PACKAGES:
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


def rejection_reasons() -> dict[str, str]:
    """Return config -> why it cannot be measured on this machine; "" if it can."""
    gpus = torch.cuda.device_count()
    reasons = dict.fromkeys(CONFIGS, "")
    for name in ("package-dp2", "package-tp2", "modelopt-tp2"):
        reasons[name] = "needs two GPUs, got one" if gpus == 1 else ""
    reasons["modelopt-split"] = "" if gpus > 1 else f"needs two GPUs, got {gpus}"
    reasons["modelopt-tp1"] = "" if gpus == 1 else "modelopt-tp2 is measured"
    return reasons


def select_configs(only: Sequence[str]) -> tuple[list[BenchmarkConfig], dict[str, str]]:
    """Return the configs to measure, in order, and skipped config -> reason.

    A config requested by name is always measured.
    """
    selected, skipped = [], {}
    for name, reason in rejection_reasons().items():
        config = CONFIGS[name]
        if name in only or (config.part in only and not reason):
            selected.append(config)
        elif config.part in only and name != "modelopt-tp1":
            skipped[name] = reason
    return selected, skipped


def scratch_parent(workload: Workload, requested: Path | None) -> Path:
    """Return the folder for the files of the run.

    Args:
        workload: sizes of the model.
        requested: the value of --scratch; None: TMPFS if it can hold four times the weights,
            else the temporary folder.
    """
    if requested is not None:
        requested.mkdir(parents=True, exist_ok=True)
        return requested
    # bf16 weights; statistics are nearly twice as large
    required = 4 * 2 * workload.linear_parameters
    if TMPFS.is_dir() and shutil.disk_usage(TMPFS).free > required:
        return TMPFS
    return Path(tempfile.gettempdir())


def file_system_type(folder: Path) -> str:
    """Return the type of the file system that holds a folder."""
    mounts = psutil.disk_partitions(all=True)
    parents = [mount for mount in mounts if folder.resolve().is_relative_to(mount.mountpoint)]
    if not parents:
        return "unknown"
    return max(parents, key=lambda mount: len(mount.mountpoint)).fstype


def run_config(config: BenchmarkConfig, task_file: Path, end: float) -> str:
    """Run the ranks of a config until `end` at most; return the error, or ""."""
    command = [sys.executable]
    if config.world_size > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
        command += ["--nproc-per-node", str(config.world_size)]
    command += [str(BENCHMARKS / "calibration_rank.py"), config.name, str(task_file)]
    threads = max(1, len(os.sched_getaffinity(0)) // config.world_size)
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    environment |= {"TRANSFORMERS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    process = subprocess.Popen(command, env=environment | os.environ)
    try:
        code = process.wait(end - time.time())
    except subprocess.TimeoutExpired:
        return "stopped: out of time"
    finally:
        if process.poll() is None:
            _kill(process)
    return f"exit code {code}" if code else ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a launcher and its ranks, which would outlive it."""
    for member in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def measure(configs: Sequence[BenchmarkConfig], task: dict[str, Any], end: float) -> None:
    """Measure every config within its share of the remaining time.

    No repeat starts that would end after the share. A config is stopped when it also used half of
    the time of the remaining configs.
    """
    prefix = "calibration-"
    with tempfile.TemporaryDirectory(dir=task["scratch_parent"], prefix=prefix) as scratch:
        for index, config in enumerate(configs):
            now = time.time()
            total_weight = sum(other.time_weight for other in configs[index:])
            deadline = now + max(0.0, end - now) * config.time_weight / total_weight
            stop = deadline + max(GRACE_SECONDS, (end - deadline) / 2)
            task_file = Path(scratch) / "task.json"
            write_json(task_file, task | {"scratch": scratch, "deadline": deadline})
            log(f"{config.name}: started, repeats until {time.ctime(deadline)}")
            error = "not started: out of time"
            if now < end:
                error = run_config(config, task_file, stop)
            if error:
                log(f"{config.name}: {error}")
                results = ResultsFile(Path(task["results"]), config.name)
                results.add("failed", case="remaining cases", samples=0, error=error)


def read_reused(path: Path, setup: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the results of an earlier command.

    Raises:
        SystemExit: they are from another machine or of other sizes.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["type"] == "setup" and _comparable(line) != _comparable(setup):
            raise SystemExit(
                f"{path} must be of the same machine and sizes: got {_comparable(line)}, "
                f"expected {_comparable(setup)}"
            )
    return lines


def _comparable(setup: dict[str, Any]) -> dict[str, Any]:
    """Return what two commands must have in common for their results to be compared."""
    machine, sizes = setup["machine"], setup["workload"]
    common = {"gpus": machine["gpus"], "versions": machine["versions"]}
    return common | {key: size for key, size in sizes.items() if key != "repeats"}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="measure calibration")
    parts = sorted({config.part for config in CONFIGS.values()})
    parser.add_argument("--only", nargs="+", choices=[*parts, *CONFIGS], metavar="PART")
    parser.add_argument("--profile", action="store_true", help="also run the part `profile`")
    for key, value in FULL_SIZES.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=int, help=f"default: {value}")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--budget", type=float, default=UNLIMITED_SECONDS, metavar="SECONDS")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--reuse", type=Path, metavar="FILE")
    parser.add_argument("--scratch", type=Path, metavar="DIR")
    return parser.parse_args()


def main() -> None:
    """Measure, and print the report; the exit code is 1 if a case failed."""
    start, args = time.time(), parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # to end ranks and remove files
    sizes = SMALL_SIZES if args.small else FULL_SIZES
    requested = {key: getattr(args, key) for key in sizes if getattr(args, key) is not None}
    workload = Workload(**sizes | requested, small=args.small)
    only = args.only or ["package", "modelopt"]
    configs, skipped = select_configs(only + ["profile"] * args.profile)
    parent = scratch_parent(workload, args.scratch)
    setup = {
        "machine": describe_machine(),
        "workload": asdict(workload),
        "command": shlex.join(["python", "benchmarks/calibration.py", *sys.argv[1:]]),
        "date": str(datetime.date.today()),
        "files": f"{parent} ({file_system_type(parent)})",
        "skipped": skipped,
    }
    lines = read_reused(args.reuse, setup) if args.reuse else []
    with tempfile.TemporaryDirectory() as folder:
        path = args.json or Path(folder) / "results.json"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        ResultsFile(path, "").add("setup", **setup)
        task = {
            "workload": asdict(workload),
            "results": str(path.resolve()),
            "scratch_parent": str(parent),
        }
        measure(configs, task, start + args.budget)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    print(make_report(lines))
    sys.exit(any(line["type"] == "failed" for line in lines))


if __name__ == "__main__":
    main()
