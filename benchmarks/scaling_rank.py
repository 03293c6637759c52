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


PHASES = {
    "import": Phase(format="int4_awq", stages=("import",), folders=("megatron",)),
    "observe": Phase(format="fp8", stages=("observe",), folders=("statistics",)),
    "calibrate": Phase(
        format="int4_awq",
        stages=("observe", "solve"),
        folders=("statistics", "int4_awq/scales", "int4_awq/quantized"),
    ),
    "export": Phase(format="int4_awq", stages=("export",), folders=("int4_awq/trtllm",)),
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
        self.overrides = [f"model={model}", f"calibration.samples={samples}"]
        self.workdir = Path(task["workdir"])
        self.is_gpu = parallel.device.type == "cuda"

    def remove(self, name: str = "") -> None:
        """Remove a stage folder, or the whole work folder (collective)."""
        self.parallel.barrier()
        if self.parallel.rank == 0:
            shutil.rmtree(self.workdir / name, ignore_errors=True)
        self.parallel.barrier()

    def run_stages(self, fmt: str, stages: tuple[str, ...]) -> Any:
        """Run stages for a format, as the command does; return the plan."""
        from nemo_vlm_ptq.context import RunContext
        from nemo_vlm_ptq.planning.make_plan import make_plan
        from nemo_vlm_ptq.recipe import load_recipe
        from nemo_vlm_ptq.stages import run_stages

        overrides = [*self.overrides, f"workdir={self.workdir}", f"quantize.format={fmt}"]
        overrides += [f"parallel.{key}={size}" for key, size in self.task["parallel"].items()]
        plan = make_plan(load_recipe(self.task["recipe"], overrides))
        run_stages(RunContext(plan=plan, parallel=self.parallel), stages)
        return plan

    def run_phase(self, name: str) -> dict[str, Any]:
        """Run a phase once.

        Returns:
            seconds: folder -> seconds of its manifest, without hashing.
            wall: wall time of the phase in seconds.
            peak: peak GPU memory of each rank in bytes.
            sent: operation -> bytes sent, of each rank.
            passes, forecast: passes over the data, and the memory forecast; if observe runs.
        """
        phase = PHASES[name]
        if "observe" in phase.stages:
            self.remove("statistics")
        SENT_BYTES.clear()
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.monotonic()
        plan = self.run_stages(phase.format, phase.stages)
        self.parallel.barrier()
        wall, sent = time.monotonic() - start, dict(SENT_BYTES)
        peak = torch.cuda.max_memory_allocated() if self.is_gpu else 0
        facts = {
            folder: json.loads((self.workdir / folder / "manifest.json").read_text())["facts"]
            for folder in phase.folders
        }
        result = {
            "seconds": {folder: facts[folder]["seconds"] for folder in phase.folders},
            "wall": wall,
            "peak": self.parallel.all_gather(peak),
            "sent": self.parallel.all_gather(sent),
        }
        if "statistics" in facts:
            result |= self.forecast(plan, facts["statistics"]["passes"])
        return result

    def forecast(self, plan: Any, passes: int) -> dict[str, int]:
        """Return the plan's forecast of a rank's memory in bytes for this number of passes."""
        from nemo_vlm_ptq.planning.forecast import observe_bytes, observe_bytes_with_passes

        sizes = self.task["parallel"]["tensor"], self.task["parallel"]["pipeline"]
        forecast = observe_bytes(plan, *sizes)
        if plan.second_moments:
            forecast = observe_bytes_with_passes(plan, *sizes, passes)
        return {"passes": passes, "forecast": forecast}

    def run(self) -> dict[str, Any]:
        """Run all phases once in an empty work folder."""
        self.remove()
        result: dict[str, Any] = {"phases": {name: self.run_phase(name) for name in PHASES}}
        manifest = json.loads((self.workdir / "int4_awq/trtllm/manifest.json").read_text())
        result["sha256"] = {
            name: file["sha256"]
            for name, file in manifest["files"].items()
            if name.endswith("safetensors")
        }
        return result

    def write(self, result: Mapping[str, Any]) -> None:
        """Append a line to the results file, on rank 0."""
        if self.parallel.rank == 0:
            keys = ("name", "machine", "layers", "samples", "layout")
            line = {key: self.task[key] for key in keys} | dict(result)
            with Path(self.task["results"]).open("a") as file:
                file.write(json.dumps(line) + "\n")

    def profile(self) -> dict[str, Any]:
        """Profile the kernels of observe and solve for int4_awq on this rank, after a run."""
        from profiling import profile

        self.remove("statistics")
        self.remove("int4_awq")
        phase = PHASES["calibrate"]
        return profile(lambda: self.run_stages(phase.format, phase.stages), self.parallel.device)


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
