"""Measures all stages on 1, 2, 4 and 8 GPUs of one host, whatever is there, in every layout.

    python benchmarks/scaling.py [--models NAME ...] [--points TPxPPxDP ...] [--json FILE]
                                 [--samples 512] [--repeats 3] [--budget SECONDS] [--profile]
                                 [--layers N] [--scratch DIR] [--plot FILE.png]

Models are folders, or names that random_model.py knows: LLaVA-1.5-7B and 13B and a LLaVA with
Yi-34B's decoder unless told, weights random; samples are the scenes, an image each. A point is a
layout, whose ranks are started for it: everything runs once on few layers, then import, observe
with maxima (fp8), observe with second moments and solve (int4_awq), and export to TensorRT-LLM at
TP 2, as the commands do, up to --repeats times. Points: data, tensor or pipeline ranks alone and
mixes of them, on as many GPUs as there are; without any, on one and two ranks of the CPU.
--profile: kernels of the last point. Numbers go line by line into --json, where those of earlier
commands on the same kind of machine are taken along. Files lie in --scratch: /dev/shm unless told.
The report is markdown on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_model import write_model
from scaling_rank import PHASES
from scaling_report import plot, report

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.planning.auto_layout import MEMORY_FRACTION
from nemo_vlm_ptq.planning.forecast import observe_bytes
from nemo_vlm_ptq.planning.plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.workdir.store import write_json

HERE = Path(__file__).resolve().parent
MODELS = ("llava-1.5-7b-hf", "llava-1.5-13b-hf", "llava-34b")
COUNTS = (1, 2, 4, 8)
MICRO_BATCH = 16
WARM_LAYERS = 2  # at least, one for each pipeline stage
WEEK = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Point:
    """A layout."""

    tensor: int
    pipeline: int
    data: int

    @classmethod
    def read(cls, word: str) -> Point:
        """Of TPxPPxDP."""
        return cls(*map(int, word.split("x")))

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        return f"{self.tensor}x{self.pipeline}x{self.data}"


def usual_points(gpus: int) -> list[Point]:
    """Data, tensor and pipeline ranks alone, and mixes from four GPUs on."""
    points = []
    for count in (one for one in COUNTS if one <= max(gpus, 1 if gpus else 2)):
        points += [Point(1, 1, count), Point(count, 1, 1), Point(1, count, 1)]
        if count >= 4:
            points += [Point(2, 1, count // 2), Point(1, 2, count // 2)]
            points.append(Point(2, 2, count // 4))
    return list(dict.fromkeys(points))


@dataclass(frozen=True)
class Model:
    """A folder with weights, one with few layers to warm up on, and a recipe for both."""

    name: str
    folder: Path
    small: Path
    recipe: Path

    def need(self, point: Point) -> int:
        """Bytes that a rank holds at least, by the plan of all phases' formats.

        Raises:
            UserError: the model has no such layout, or a format does not fit it.
        """
        words = [f"parallel.{key}={size}" for key, size in vars(point).items()]
        formats = ",".join(dict.fromkeys(fmt for fmt, *_ in PHASES.values()))
        plan = make_plan(load_recipe(str(self.recipe), [*words, f"quantize.format=[{formats}]"]))
        return observe_bytes(plan, point.tensor, point.pipeline)


def make_model(name: str, home: Path, layers: int | None, warm_layers: int) -> Model:
    """Write the folders of a model; one that is there warms up as it is."""
    folder, small = home / name, home / f"{name}-small"
    if Path(name).is_dir():
        folder = small = Path(name)
    else:
        begin = time.monotonic()
        write_model(name, folder, layers)
        write_model(name, small, warm_layers)
        log(f"{name} made in {time.monotonic() - begin:.0f} s")
    recipe = home / "recipe.yaml"  # JSON is YAML
    wanted = {
        "model": str(folder),
        "workdir": str(home / "work"),
        "calibration": {"data": "scenes", "micro_batch": MICRO_BATCH},
        "export": {"targets": ["trtllm"], "tensor": 2},
    }
    write_json(recipe, wanted)
    return Model(folder.name, folder, small, recipe)


def log(message: str) -> None:
    """A line on stderr with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def machine() -> str:
    """What numbers depend on: they are only put together when it is the same."""
    gpus = torch.cuda.is_available()
    name = torch.cuda.get_device_name(0) if gpus else "CPU"
    return f"{name}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"


def read_numbers(path: Path) -> list[dict[str, Any]]:
    """Lines of this command and of those before.

    Raises:
        SystemExit: they are of another kind of machine.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for line in lines:
        if line["machine"].split(",")[0] != machine().split(",")[0]:
            raise SystemExit(f"{path} is of {line['machine']}, this is {machine()}")
    return lines


def refusal(model: Model, point: Point) -> str:
    """Why a point cannot be measured here, or ""."""
    gpus = torch.cuda.device_count()
    if gpus and point.ranks > gpus:
        return f"{gpus} GPUs"
    try:
        need = model.need(point)
    except UserError as error:
        return str(error)
    if gpus:
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(gpus))
        if need > MEMORY_FRACTION * memory:
            return f"a rank takes {need / 1e9:.1f} GB of a GPU's {memory / 1e9:.1f}"
    return ""


def measure(model: Model, point: Point, job: dict[str, Any], home: Path) -> None:
    """Start the ranks of a point, and wait for them."""
    file = home / "job.json"
    about = {"name": model.name, "point": str(point), "parallel": vars(point)}
    about["warm_samples"] = MICRO_BATCH * point.data
    paths = {"model": str(model.folder), "small": str(model.small), "recipe": str(model.recipe)}
    write_json(file, job | about | paths | {"workdir": str(home / "work")})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr", "localhost", "--nproc-per-node", str(point.ranks)]
    threads = max(1, len(os.sched_getaffinity(0)) // point.ranks)
    settings = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    subprocess.run(
        [*command, str(HERE / "scaling_rank.py"), str(file)], env=settings | os.environ, check=True
    )


def run_model(
    model: Model, points: Sequence[Point], job: dict[str, Any], home: Path, end: float
) -> dict[str, str]:
    """Every point that fits; returns those that were left out, and why."""
    left = {str(point): why for point in points if (why := refusal(model, point))}
    chosen = [point for point in points if str(point) not in left]
    for index, point in enumerate(chosen):
        now = time.time()
        if now > end:
            left[str(point)] = "no time"
            continue
        deadline = now + (end - now) / (len(chosen) - index)
        last = index == len(chosen) - 1
        log(f"{model.name}, {point}: repeats may go on until {time.ctime(deadline)}")
        more = {"deadline": deadline, "profile": job["profile"] and last}
        measure(model, point, job | more, home)
    return left


def main() -> None:
    """Measure, and print the report."""
    parser = argparse.ArgumentParser(description="measures scaling over the GPUs of a host")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--points", nargs="+", type=Point.read, metavar="TPxPPxDP")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=WEEK, metavar="SECONDS")
    parser.add_argument("--layers", type=int, metavar="N")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    wanted = parser.parse_args()
    end = time.time() + wanted.budget
    if wanted.json:
        read_numbers(wanted.json)  # refused now, not when all is measured
    points = wanted.points or usual_points(torch.cuda.device_count())
    with tempfile.TemporaryDirectory(dir=wanted.scratch, prefix="scaling-") as scratch:
        home = Path(scratch)
        numbers = wanted.json or home / "numbers.json"
        job = {"samples": wanted.samples, "repeats": wanted.repeats, "profile": wanted.profile}
        job |= {"layers": wanted.layers, "numbers": str(numbers.absolute()), "machine": machine()}
        left, warm_layers = {}, max(WARM_LAYERS, *(point.pipeline for point in points))
        for name in wanted.models:
            model = make_model(name, home, wanted.layers, warm_layers)
            left[model.name] = run_model(model, points, job, home, end)
            for folder in home.glob(f"{model.name}*"):
                shutil.rmtree(folder)
        lines = read_numbers(numbers)
        print(report(lines, left))
        if wanted.plot:
            plot(lines, wanted.plot)


if __name__ == "__main__":
    main()
