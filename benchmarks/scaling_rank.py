"""A rank of benchmarks/scaling.py, which starts it: every stage of a layout, timed, into a file.

python benchmarks/scaling_rank.py JOB.json
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SENT: Counter[str] = Counter()  # operation -> bytes that this rank sent
# operation -> bytes sent by each rank of a ring of n, of a tensor's bytes
RING: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: n - 1,
    "all_gather_into_tensor": lambda n: n - 1,
    "reduce_scatter_tensor": lambda n: (n - 1) / n,
    "reduce": lambda n: (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
    "send": lambda n: 1,
}
GIVEN = {"all_gather": 1, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}  # the argument


def count_traffic() -> None:
    """From now on, every collective of torch.distributed adds to SENT; before megatron comes."""

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            group = options.get("group") or next(
                (one for one in args if isinstance(one, dist.ProcessGroup)), None
            )
            given = args[GIVEN.get(name, 0)] if len(args) > GIVEN.get(name, 0) else None
            given = given if given is not None else options.get("input", options.get("tensor"))
            share = RING[name](dist.get_world_size(group))
            SENT[name] += int(given.numel() * given.element_size() * share)
            return real(*args, **options)

        return call

    for name in RING:
        setattr(dist, name, counting(name, getattr(dist, name)))


# phase -> (format, stages, folders whose seconds are its own)
PHASES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "import": ("int4_awq", ("import",), ("megatron",)),
    "observe": ("fp8", ("observe",), ("statistics",)),
    "calibrate": (
        "int4_awq",
        ("observe", "solve"),
        ("statistics", "int4_awq/scales", "int4_awq/quantized"),
    ),
    "export": ("int4_awq", ("export",), ("int4_awq/trtllm",)),
}


class Line:
    """All phases of one layout on these ranks."""

    def __init__(self, own: Any, job: Mapping[str, Any], model: str, samples: int) -> None:
        self.own, self.job = own, job
        self.given = [f"model={model}", f"calibration.samples={samples}"]
        self.work = Path(job["workdir"])
        self.gpu = own.device.type == "cuda"

    def remove(self, name: str = "") -> None:
        """A folder of the work folder, or all of it."""
        self.own.barrier()
        if self.own.rank == 0:
            shutil.rmtree(self.work / name, ignore_errors=True)
        self.own.barrier()

    def stages(self, fmt: str, names: tuple[str, ...]) -> Any:
        """Run some stages for a format, as the command does; returns the plan."""
        from nemo_vlm_ptq.context import RunContext
        from nemo_vlm_ptq.planning.plan import make_plan
        from nemo_vlm_ptq.recipe import load_recipe
        from nemo_vlm_ptq.stages import run_stages

        words = [*self.given, f"workdir={self.work}", f"quantize.format={fmt}"]
        words += [f"parallel.{key}={size}" for key, size in self.job["parallel"].items()]
        plan = make_plan(load_recipe(self.job["recipe"], words))
        run_stages(RunContext(plan, self.own), names)
        return plan

    def phase(self, name: str) -> dict[str, Any]:
        """Seconds of each folder, and of all by the clock; GB at most and bytes sent by rank."""
        fmt, names, folders = PHASES[name]
        if "observe" in names:
            self.remove("statistics")
        SENT.clear()
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        begin = time.monotonic()
        plan = self.stages(fmt, names)
        self.own.barrier()
        whole, sent = time.monotonic() - begin, dict(SENT)
        peak = torch.cuda.max_memory_allocated() if self.gpu else 0
        manifests = [json.loads((self.work / one / "manifest.json").read_text()) for one in folders]
        facts = {name: one["facts"] for name, one in zip(folders, manifests, strict=True)}
        found = {
            "seconds": {name: one["seconds"] for name, one in facts.items()},
            "clock": whole,
            "peak": self.own.gather(peak),
            "sent": self.own.gather(sent),
        }
        if "statistics" in facts:
            found |= self.forecast(plan, facts["statistics"]["passes"])
        return found

    def forecast(self, plan: Any, passes: int) -> dict[str, int]:
        """Bytes that a rank holds at most, by the plan, if the data runs so many times."""
        from nemo_vlm_ptq.planning.forecast import observe_bytes, second_moment_bytes

        cut = self.job["parallel"]["tensor"], self.job["parallel"]["pipeline"]
        said = observe_bytes(plan, *cut)
        if plan.second_moments:
            said = second_moment_bytes(plan, *cut, passes)
        return {"passes": passes, "forecast": said}

    def run(self) -> dict[str, Any]:
        """All phases once, from an empty work folder."""
        self.remove()
        found: dict[str, Any] = {"phases": {name: self.phase(name) for name in PHASES}}
        files = json.loads((self.work / "int4_awq/trtllm/manifest.json").read_text())["files"]
        found["sha256"] = {
            name: one["sha256"] for name, one in files.items() if name.endswith("safetensors")
        }
        return found

    def write(self, found: Mapping[str, Any]) -> None:
        """A line of the file of numbers, by the first rank."""
        if self.own.rank == 0:
            about = {
                key: self.job[key] for key in ("name", "machine", "layers", "samples", "point")
            }
            with Path(self.job["numbers"]).open("a") as file:
                file.write(json.dumps(about | dict(found)) + "\n")

    def profile(self) -> dict[str, Any]:
        """Kernels of observe and solve for int4_awq on this rank, after a run."""
        from calibration_ours import profile

        self.remove("statistics")
        self.remove("int4_awq")
        return profile(lambda: self.stages(*PHASES["calibrate"][:2]), self.own.device)


def main() -> None:
    """Warm up on few layers, then run all phases as often as there is time."""
    job = json.loads(Path(sys.argv[1]).read_text())
    count_traffic()
    from nemo_vlm_ptq.megatron.parallel_context import parallel_context

    os.dup2(2, 1)  # stdout is for the report
    with parallel_context(job["parallel"]) as own:
        Line(own, job, job["small"], job["warm_samples"]).run()
        line = Line(own, job, job["model"], job["samples"])
        for number in range(job["repeats"]):
            begin = time.time()
            line.write(line.run())
            enough = number + 1 == job["repeats"] or 2 * time.time() - begin > job["deadline"]
            if own.gather(enough)[0]:
                break
        if job["profile"]:
            line.write({"profile": line.profile()})
        line.remove()


if __name__ == "__main__":
    main()
