"""One rank of benchmarks/scaling.py, which starts it: times every stage of one layout.

python benchmarks/scaling_rank.py TASK.json

torch.distributed is patched before megatron-core is imported, to count the bytes that are sent.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SENT_BYTES: Counter[str] = Counter()  # operation -> bytes sent by this rank
# operation -> fraction of a tensor's bytes that each rank of a ring of n sends
RING_FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: n - 1,
    "all_gather_into_tensor": lambda n: n - 1,
    "reduce_scatter_tensor": lambda n: (n - 1) / n,
    "reduce": lambda n: (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
    "send": lambda n: 1,
}
# operation -> position of the input tensor, where it is not the first argument
INPUT_POSITIONS = {"all_gather": 1, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}


def count_sent_bytes() -> None:
    """Patch the collectives of torch.distributed to count in SENT_BYTES."""

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            group = options.get("group") or next(
                (arg for arg in args if isinstance(arg, dist.ProcessGroup)), None
            )
            position = INPUT_POSITIONS.get(name, 0)
            tensor = args[position] if len(args) > position else None
            tensor = tensor if tensor is not None else options.get("input", options.get("tensor"))
            factor = RING_FACTORS[name](dist.get_world_size(group))
            SENT_BYTES[name] += int(tensor.numel() * tensor.element_size() * factor)
            return original(*args, **options)

        return call

    for name in RING_FACTORS:
        setattr(dist, name, counting(name, getattr(dist, name)))


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Stages that are timed together.

    format: the format of the recipe.
    stages: stages that run.
    folders: stage folders that they write, below the work folder.
    """

    format: str
    stages: tuple[str, ...]
    folders: tuple[str, ...]


EXPORT_FOLDER = "int4_awq/compressed_tensors"
PHASES = {
    "maxima": Phase(
        format="fp8", stages=("observe", "solve"), folders=("statistics", "fp8/scales")
    ),
    "search": Phase(
        format="int4_awq", stages=("observe", "solve"), folders=("statistics", "int4_awq/scales")
    ),
    "export": Phase(format="int4_awq", stages=("export",), folders=(EXPORT_FOLDER,)),
}


class LayoutBenchmark:
    """All phases of one layout on these ranks.

    parallel: this rank's parallel context.
    task: the parsed TASK.json.
    model: the model folder.
    samples: number of calibration samples.
    """

    def __init__(self, parallel: Any, task: Mapping[str, Any], model: str, samples: int) -> None:
        self.parallel, self.task = parallel, task
        self.overrides = [
            f"model={model}",
            f"calibration.samples={samples}",
            f"calibration.window={task['window']}",
            f"calibration.keep_statistics={task['keep_statistics']}",
        ]
        self.workdir = Path(task["workdir"])
        self.is_gpu = parallel.device.type == "cuda"

    def remove(self, name: str = "") -> None:
        """Remove a stage folder, or the whole work folder (collective)."""
        self.parallel.barrier()
        if self.parallel.rank == 0:
            shutil.rmtree(self.workdir / name, ignore_errors=True)
        self.parallel.barrier()

    def plan(self, fmt: str) -> Any:
        """Return the plan of a format on these ranks."""
        from nemo_vlm_ptq.planning.make_plan import make_plan
        from nemo_vlm_ptq.recipe import load_recipe

        overrides = [*self.overrides, f"workdir={self.workdir}", f"quantize.format={fmt}"]
        overrides += [f"parallel.{key}={size}" for key, size in self.task["parallel"].items()]
        return make_plan(load_recipe(self.task["recipe"], overrides))

    def run_stages(self, plan: Any, stages: tuple[str, ...]) -> None:
        """Run stages of a plan, as the command does."""
        from nemo_vlm_ptq.context import RunContext
        from nemo_vlm_ptq.stages import run_stages

        run_stages(RunContext(plan=plan, parallel=self.parallel), stages)

    def run_phase(self, name: str) -> dict[str, Any]:
        """Run a phase once.

        Returns:
            seconds: folder -> seconds of its manifest, without hashing.
            wall: wall time of the phase in seconds.
            peak: peak GPU memory of each rank in bytes.
            sent: operation -> bytes sent, of each rank.
            windows, forecast: windows of a stage, and the memory forecast; if observe runs.
        """
        phase = PHASES[name]
        plan = self.plan(phase.format)
        result = {}
        if "observe" in phase.stages:
            self.remove("statistics")
            result = self.forecast(plan)
        SENT_BYTES.clear()
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.monotonic()
        self.run_stages(plan, phase.stages)
        self.parallel.barrier()
        wall, sent = time.monotonic() - start, dict(SENT_BYTES)
        peak = torch.cuda.max_memory_allocated() if self.is_gpu else 0
        manifests = {folder: self.workdir / folder / "manifest.json" for folder in phase.folders}
        return result | {
            "seconds": {
                folder: json.loads(path.read_text())["facts"]["seconds"]
                for folder, path in manifests.items()
            },
            "wall": wall,
            "peak": self.parallel.all_gather(peak),
            "sent": self.parallel.all_gather(sent),
        }

    def forecast(self, plan: Any) -> dict[str, int]:
        """Return the windows of a stage, and the plan's forecast of a rank's memory in bytes."""
        from nemo_vlm_ptq.megatron.parallel_context import free_memory
        from nemo_vlm_ptq.planning.windows import plan_windows

        layout = self.parallel.layout
        memory = min(self.parallel.all_gather(free_memory(self.parallel.device)))
        windows = plan_windows(plan, layout.tensor, layout.pipeline, layout.data, memory)
        return {
            "windows": windows.count,
            "forecast": windows.device_bytes + windows.states_on_device,
        }

    def run(self) -> dict[str, Any]:
        """Run all phases once in an empty work folder."""
        self.remove()
        result: dict[str, Any] = {"phases": {name: self.run_phase(name) for name in PHASES}}
        manifest = json.loads((self.workdir / EXPORT_FOLDER / "manifest.json").read_text())
        result["sha256"] = {
            name: file["sha256"]
            for name, file in manifest["files"].items()
            if name.endswith("safetensors")
        }
        return result

    def write(self, result: Mapping[str, Any]) -> None:
        """Append a line to the results file, on rank 0."""
        if self.parallel.rank == 0:
            keys = ("name", "machine", "layers", "samples", "window", "layout")
            line = {key: self.task[key] for key in keys} | dict(result)
            with Path(self.task["results"]).open("a") as file:
                file.write(json.dumps(line) + "\n")

    def profile(self) -> dict[str, Any]:
        """Profile the kernels of observe and solve for int4_awq on this rank, after a run."""
        from profiling import profile

        self.remove("statistics")
        self.remove("int4_awq")
        phase = PHASES["search"]
        plan = self.plan(phase.format)
        return profile(lambda: self.run_stages(plan, phase.stages), self.parallel.device)


def main() -> None:
    """Warm up on few layers, then run all phases repeatedly while there is time."""
    task = json.loads(Path(sys.argv[1]).read_text())
    count_sent_bytes()
    from nemo_vlm_ptq.megatron.parallel_context import parallel_context

    os.dup2(2, 1)  # stdout is reserved for the report
    with parallel_context(task["parallel"]) as parallel:
        LayoutBenchmark(parallel, task, task["warm_up_model"], task["warm_up_samples"]).run()
        benchmark = LayoutBenchmark(parallel, task, task["model"], task["samples"])
        for number in range(task["repeats"]):
            start = time.time()
            benchmark.write(benchmark.run())
            expected_end = 2 * time.time() - start  # of another run
            is_last = number + 1 == task["repeats"] or expected_end > task["deadline"]
            if parallel.all_gather(is_last)[0]:
                break
        if task["profile"]:
            benchmark.write({"profile": benchmark.profile()})
        benchmark.remove()


if __name__ == "__main__":
    main()
