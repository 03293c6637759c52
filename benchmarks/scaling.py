"""Measure all stages in every parallel layout of the GPUs of one host.

    python benchmarks/scaling.py [--models NAME ...] [--points TPxPPxDP ...] [--json FILE]
                                 [--samples 512] [--window N] [--keep-statistics] [--repeats 3]
                                 [--budget SECONDS] [--profile] [--layers N] [--scratch DIR]
                                 [--plot FILE.png]

Models are folders, or names of random_model.py with random weights (default: LLaVA-1.5-7B and 13B
and a LLaVA with Yi-34B's decoder). Samples are the built-in scenes, one image each. For each layout
the ranks are started, warm up on a few layers, and then run up to --repeats times: observe and
solve from maxima (fp8), observe and solve with a search (int4_awq), and export to
compressed_tensors, as the commands do. --window and --keep-statistics set calibration.window and
calibration.keep_statistics. Default layouts are data, tensor and pipeline parallelism alone and
combined, on 1, 2, 4 and 8 GPUs as available; without a GPU, on one and two CPU ranks. --profile
lists the kernels of the last layout. Results are appended to --json line by line; lines of earlier
commands on the same kind of machine are included in the report. Files are written to --scratch
(default: /dev/shm). The report is markdown on stdout.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from random_model import write_model
from scaling_rank import PHASES
from scaling_report import make_report, save_plot

from nemo_vlm_ptq.distributed.layout import Layout
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.planning.windows import MEMORY_FRACTION, window_bytes
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.workdir.store import write_json

BENCHMARKS = Path(__file__).resolve().parent
MODELS = ("llava-1.5-7b-hf", "llava-1.5-13b-hf", "llava-34b")
GPU_COUNTS = (1, 2, 4, 8)
MICRO_BATCH = 16
MIN_WARM_UP_LAYERS = 2  # and at least one per pipeline stage
UNLIMITED_SECONDS = 7 * 24 * 3600.0


def parse_layout(text: str) -> Layout:
    """Parse TPxPPxDP."""
    tensor, pipeline, data = map(int, text.split("x"))
    return Layout(tensor=tensor, pipeline=pipeline, data=data)


def layout_key(layout: Layout) -> str:
    """Return TPxPPxDP, the inverse of `parse_layout`."""
    return f"{layout.tensor}x{layout.pipeline}x{layout.data}"


def default_layouts(gpus: int) -> list[Layout]:
    """Return DP, TP and PP alone, and combinations from four GPUs on."""
    layouts = []
    max_ranks = gpus or 2
    for count in (count for count in GPU_COUNTS if count <= max_ranks):
        layouts += [Layout(data=count), Layout(tensor=count), Layout(pipeline=count)]
        if count >= 4:
            layouts += [
                Layout(tensor=2, data=count // 2),
                Layout(pipeline=2, data=count // 2),
                Layout(tensor=2, pipeline=2, data=count // 4),
            ]
    return list(dict.fromkeys(layouts))


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model to measure.

    name: its name in the report.
    folder: the model folder.
    warm_up_folder: a folder with few layers, for the warm-up; or the same folder.
    recipe: path of a recipe.
    """

    name: str
    folder: Path
    warm_up_folder: Path
    recipe: Path

    def required_bytes(self, layout: Layout, window: str) -> int:
        """Return the forecast of the least memory of a rank in observe, for all phases' formats.

        Raises:
            UserError: the model does not support the layout, or a format does not fit the model.
        """
        formats = ",".join(dict.fromkeys(phase.format for phase in PHASES.values()))
        overrides = [f"parallel.{key}={size}" for key, size in asdict(layout).items()]
        overrides.append(f"quantize.format=[{formats}]")
        plan = make_plan(load_recipe(str(self.recipe), overrides))
        size = 1 if window == "auto" else int(window)
        return window_bytes(plan, layout.tensor, layout.pipeline, size)


def make_model(name: str, parent: Path, layers: int | None, warm_up_layers: int) -> Model:
    """Write the folders of a model, and its recipe; an existing folder is used for the warm-up too.

    Args:
        name: a model folder, or a name of random_model.py.
        parent: where to write.
        layers: decoder layers of a random model; None for all.
        warm_up_layers: decoder layers of the model for the warm-up.
    """
    folder, warm_up_folder = parent / name, parent / f"{name}-small"
    if Path(name).is_dir():
        folder = warm_up_folder = Path(name)
    else:
        start = time.monotonic()
        write_model(name, folder, layers)
        write_model(name, warm_up_folder, warm_up_layers)
        log(f"{name} written in {time.monotonic() - start:.0f} s")
    recipe_path = parent / "recipe.yaml"  # JSON is YAML
    recipe = {
        "model": str(folder),
        "workdir": str(parent / "work"),
        "calibration": {"data": "scenes", "micro_batch": MICRO_BATCH},
        "export": {"targets": ["compressed_tensors"]},
    }
    write_json(recipe_path, recipe)
    return Model(name=folder.name, folder=folder, warm_up_folder=warm_up_folder, recipe=recipe_path)


def log(message: str) -> None:
    """Print a line with the time of day to stderr."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def describe_machine() -> str:
    """Return device, cores and torch version; results are combined only on the same device."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return f"{device}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a results file; an empty list if it does not exist.

    Raises:
        SystemExit: they are from another kind of machine.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    machine = describe_machine()
    for line in lines:
        if line["machine"].split(",")[0] != machine.split(",")[0]:
            raise SystemExit(f"{path} must be of this machine, {machine}; got {line['machine']}")
    return lines


def rejection_reason(model: Model, layout: Layout, window: str) -> str:
    """Return why a layout cannot be measured here; "" if it can."""
    gpus = torch.cuda.device_count()
    if gpus and layout.world_size > gpus:
        return f"needs {layout.world_size} GPUs, got {gpus}"
    try:
        required = model.required_bytes(layout, window)
    except UserError as error:
        return str(error)
    if gpus:
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(gpus))
        if required > MEMORY_FRACTION * memory:
            return f"needs {required / 1e9:.1f} GB per rank, a GPU has {memory / 1e9:.1f} GB"
    return ""


def measure(model: Model, layout: Layout, task: dict[str, Any], parent: Path) -> None:
    """Start the ranks of a layout and wait for them."""
    task_file = parent / "task.json"
    task = task | {
        "name": model.name,
        "layout": layout_key(layout),
        "parallel": asdict(layout),
        "warm_up_samples": MICRO_BATCH * layout.data,
        "model": str(model.folder),
        "warm_up_model": str(model.warm_up_folder),
        "recipe": str(model.recipe),
        "workdir": str(parent / "work"),
    }
    write_json(task_file, task)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr", "localhost", "--nproc-per-node", str(layout.world_size)]
    command += [str(BENCHMARKS / "scaling_rank.py"), str(task_file)]
    threads = max(1, len(os.sched_getaffinity(0)) // layout.world_size)
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    subprocess.run(command, env=environment | os.environ, check=True)


def run_model(
    model: Model, layouts: Sequence[Layout], task: dict[str, Any], parent: Path, end: float
) -> dict[str, str]:
    """Measure every supported layout until `end`; return skipped layout -> reason."""
    reasons = {layout: rejection_reason(model, layout, task["window"]) for layout in layouts}
    skipped = {layout_key(layout): reason for layout, reason in reasons.items() if reason}
    selected = [layout for layout, reason in reasons.items() if not reason]
    for index, layout in enumerate(selected):
        now = time.time()
        if now > end:
            skipped[layout_key(layout)] = "out of time"
            continue
        deadline = now + (end - now) / (len(selected) - index)
        is_last = index == len(selected) - 1
        log(f"{model.name}, {layout}: started, repeats until {time.ctime(deadline)}")
        options = {"deadline": deadline, "profile": task["profile"] and is_last}
        measure(model, layout, task | options, parent)
    return skipped


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="measure scaling over the GPUs of a host")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument(
        "--points", nargs="+", type=parse_layout, metavar="TPxPPxDP", help="parallel layouts"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--window", default="auto", metavar="N", help="layers at a time")
    parser.add_argument("--keep-statistics", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=UNLIMITED_SECONDS, metavar="SECONDS")
    parser.add_argument("--layers", type=int, metavar="N")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    return parser.parse_args()


def main() -> None:
    """Measure, and print the report."""
    args = parse_args()
    end = time.time() + args.budget
    if args.json:
        read_results(args.json)  # rejects another machine before anything is measured
    layouts = args.points or default_layouts(torch.cuda.device_count())
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="scaling-") as scratch:
        parent = Path(scratch)
        results = args.json or parent / "results.json"
        task = {
            "samples": args.samples,
            "window": args.window,
            "keep_statistics": args.keep_statistics,
            "repeats": args.repeats,
            "profile": args.profile,
            "layers": args.layers,
            "results": str(results.absolute()),
            "machine": describe_machine(),
        }
        warm_up_layers = max(MIN_WARM_UP_LAYERS, *(layout.pipeline for layout in layouts))
        skipped = {}
        for name in args.models:
            model = make_model(name, parent, args.layers, warm_up_layers)
            skipped[model.name] = run_model(model, layouts, task, parent, end)
            for folder in parent.glob(f"{model.name}*"):
                shutil.rmtree(folder)
        lines = read_results(results)
        print(make_report(lines, skipped))
        if args.plot:
            save_plot(lines, args.plot)


if __name__ == "__main__":
    main()
