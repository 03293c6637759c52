"""Time the cases of benchmarks/calibration.py on all ranks and record the results."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nemo_vlm_ptq.megatron.parallel_context import ParallelContext


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to measure.

    name: what runs.
    samples: number of calibration samples.
    setup: makes the argument of `run`; not timed.
    run: the timed function; returns how many of its seconds were spent on files.
    """

    name: str
    samples: int
    setup: Callable[[], Any]
    run: Callable[[Any], float]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Result of one run of a case.

    seconds: wall time of the slowest rank.
    file_seconds: seconds spent on reading and writing files, of the slowest rank.
    peak_gb: peak allocated memory of each GPU in GB.
    error: the error that ended the run; "" if it succeeded.
    """

    seconds: float = 0.0
    file_seconds: float = 0.0
    peak_gb: tuple[float, ...] = ()
    error: str = ""


class Timer:
    """Times cases on the devices of this rank, together with the other ranks."""

    def __init__(self, devices: Sequence[torch.device], parallel: ParallelContext | None) -> None:
        self.parallel = parallel
        self.gpus = [device for device in devices if device.type == "cuda"]

    def all_gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks (collective)."""
        return [value] if self.parallel is None else self.parallel.all_gather(value)

    def synchronize(self) -> None:
        """Wait for the queued work of the GPUs."""
        for gpu in self.gpus:
            torch.cuda.synchronize(gpu)

    def free_memory(self) -> None:
        """Collect garbage and release cached GPU memory."""
        gc.collect()
        if self.gpus:
            torch.cuda.empty_cache()

    def run(self, case: Case) -> Run:
        """Run a case once on all ranks; an error is recorded and not raised (collective)."""
        try:
            result = self._run(case)
        except Exception as error:
            traceback.print_exc()
            lines = str(error).splitlines() or [""]
            result = Run(error=f"{type(error).__name__}: {lines[0][:200]}")
        self.free_memory()
        runs: list[Run] = self.all_gather(result)
        return Run(
            seconds=max(run.seconds for run in runs),
            file_seconds=max(run.file_seconds for run in runs),
            peak_gb=tuple(peak for run in runs for peak in run.peak_gb),
            error=next((run.error for run in runs if run.error), ""),
        )

    def _run(self, case: Case) -> Run:
        argument = case.setup()
        self.free_memory()
        for gpu in self.gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        self.synchronize()
        if self.parallel is not None:
            self.parallel.barrier()
            self.synchronize()
        start = time.perf_counter()
        file_seconds = case.run(argument)
        self.synchronize()
        seconds = time.perf_counter() - start
        peaks = tuple(torch.cuda.max_memory_allocated(gpu) / 1e9 for gpu in self.gpus)
        return Run(seconds=seconds, file_seconds=file_seconds, peak_gb=peaks)


class ResultsFile:
    """JSON lines file of results, appended to after each run so that an abort loses nothing.

    Every line has a `type` (setup, run, failed, fact or profile) and the name of a config.
    """

    def __init__(self, path: Path, config: str, is_writer: bool = True) -> None:
        self.path, self.config, self.is_writer = path, config, is_writer

    def add(self, line_type: str, **values: Any) -> None:
        """Append a line; a no-op on ranks that do not write."""
        if self.is_writer:
            with self.path.open("a") as file:
                file.write(json.dumps({"type": line_type, "config": self.config, **values}) + "\n")

    def add_run(self, case: Case, run: Run) -> None:
        """Append a run of a case, or its error."""
        line_type = "failed" if run.error else "run"
        self.add(line_type, case=case.name, samples=case.samples, **asdict(run))


def matmul_rate(device: torch.device) -> float:
    """Return the FLOP/s of a large bf16 matrix multiplication, the best of five runs."""
    size, count = (8192, 10) if device.type == "cuda" else (1024, 2)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def multiply(_: Any) -> float:
        for _ in range(count):
            a @ b
        return 0.0

    timer = Timer([device], None)
    case = Case(name="matmul", samples=0, setup=lambda: None, run=multiply)
    timer.run(case)  # warm-up
    best = min(timer.run(case).seconds for _ in range(5))
    return count * 2 * size**3 / best
