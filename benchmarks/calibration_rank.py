"""One rank of benchmarks/calibration.py, which starts it: measures one config.

python benchmarks/calibration_rank.py CONFIG TASK.json

Each config runs in new processes, so that none inherits GPU memory or process groups.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from calibration_common import CONFIGS, BenchmarkConfig, Workload, log
from calibration_timing import Case, ResultsFile, Timer, matmul_rate

from nemo_vlm_ptq.megatron.parallel_context import ParallelContext, parallel_context
from nemo_vlm_ptq.workdir.store import read_json

WARM_UP_LAYERS = 2
WARM_UP_MICRO_BATCHES = 16
PROFILED_LAYERS = 8  # enough, because all layers have the same kernels


def warm_up_workload(workload: Workload) -> Workload:
    """Return a workload with the same widths and micro-batches, but fewer layers and samples."""
    samples = min(workload.samples, WARM_UP_MICRO_BATCHES * workload.micro_batch)
    return replace(workload, layers=min(WARM_UP_LAYERS, workload.layers), samples=samples)


def warm_up(cases: Sequence[Case], timer: Timer) -> None:
    """Run each case once without recording it."""
    for case in cases:
        run = timer.run(case)
        log(f"warm-up, {case.name}: {run.error or f'{run.seconds:.2f} s'}")


class CaseRunner:
    """Runs cases repeatedly until the deadline.

    timer: times the cases.
    results: where runs are recorded.
    deadline: time after which no run may end.
    base_samples: number of samples of most cases.
    """

    def __init__(
        self, timer: Timer, results: ResultsFile, deadline: float, base_samples: int
    ) -> None:
        self.timer, self.results = timer, results
        self.deadline, self.base_samples = deadline, base_samples
        # case -> seconds of its first run with setup, and of that run's passes over the data
        self._durations: dict[str, tuple[float, float]] = {}
        self._failed: set[str] = set()

    def measure(self, cases: Sequence[Case], more: Sequence[Case], repeats: int) -> None:
        """Run all cases once, then `more` if there is time, then repeats while there is time.

        Args:
            cases: cases with `base_samples` samples.
            more: cases with another number of samples.
            repeats: largest number of runs of a case.
        """
        extra = repeats - 1
        for case in [*cases, *more, *(list(cases) * extra), *(list(more) * extra)]:
            label = f"{self.results.config}, {case.name}, {case.samples} samples"
            if case.name in self._failed:
                continue
            if not self._fits(case):
                log(f"{label}: skipped, no time left")
                continue
            start = time.time()
            run = self.timer.run(case)
            durations = time.time() - start, run.seconds - run.file_seconds
            self._durations.setdefault(case.name, durations)
            self.results.add_run(case, run)
            self._failed |= {case.name} if run.error else set()
            timing = f"{run.seconds:.2f} s, {run.file_seconds:.2f} s of them files"
            log(f"{label}: {run.error or timing}")

    def _fits(self, case: Case) -> bool:
        """Return whether the case is expected to end before the deadline; rank 0 decides."""
        if case.name not in self._durations:
            return True
        total, data = self._durations[case.name]
        end = time.time() + total + data * (case.samples / self.base_samples - 1)
        return self.timer.all_gather(end < self.deadline)[0]


def measure_package(config: BenchmarkConfig, workload: Workload, task: dict[str, Any]) -> None:
    """Measure observe and solve on these ranks."""
    from calibration_package import PackageBenchmark

    folder = Path(task["scratch"])
    sizes = {"tensor": config.tensor, "pipeline": 1, "data": config.data}
    with parallel_context(sizes) as parallel:
        timer = Timer([parallel.device], parallel)
        results = _results_file(config, task, parallel)
        small = warm_up_workload(workload)
        warm_up(list(PackageBenchmark(parallel, small, folder).cases(small.samples)), timer)
        timer.free_memory()
        rates = timer.all_gather(matmul_rate(parallel.device))
        results.add("fact", key="rates", value=rates)
        benchmark = PackageBenchmark(parallel, workload, folder)
        more = workload.more_samples
        runner = CaseRunner(timer, results, task["deadline"], workload.samples)
        runner.measure(
            list(benchmark.cases(workload.samples)),
            list(benchmark.cases(more, observe_alone=False)) if more else [],
            workload.repeats,
        )
        parallel.barrier()
        statistics = [benchmark.statistics_gigabytes(), benchmark.passes]
        results.add("fact", key="statistics", value=statistics)
        results.add("fact", key="scales", value=benchmark.hash_scales())


def measure_profile(config: BenchmarkConfig, workload: Workload, task: dict[str, Any]) -> None:
    """Profile the kernels of observe and of an AWQ solve."""
    from calibration_package import PackageBenchmark

    with parallel_context({"tensor": 1, "pipeline": 1, "data": 1}) as parallel:
        timer = Timer([parallel.device], parallel)
        results = _results_file(config, task, parallel)
        few_layers = replace(workload, layers=min(PROFILED_LAYERS, workload.layers))
        benchmark = PackageBenchmark(parallel, few_layers, Path(task["scratch"]))
        for _ in benchmark.profiles():  # warm-up
            timer.free_memory()
        for label, profile in benchmark.profiles():
            log(f"profile, {label}: {profile['wall']:.2f} s")
            results.add("profile", case=label, **profile)
            timer.free_memory()


def measure_modelopt(config: BenchmarkConfig, workload: Workload, task: dict[str, Any]) -> None:
    """Measure modelopt's calibration of a Hugging Face or a Megatron-core model."""
    if not config.name.startswith("modelopt-tp"):
        names = ("cuda:0", "cuda:1") if torch.cuda.is_available() else ("cpu", "cpu")
        count = 2 if config.name == "modelopt-split" else 1
        devices = tuple(map(torch.device, names[:count]))
        _measure_modelopt(config, workload, task, devices, None)
        return
    with parallel_context({"tensor": config.tensor, "pipeline": 1, "data": 1}) as parallel:
        _measure_modelopt(config, workload, task, (parallel.device,), parallel)


def _measure_modelopt(
    config: BenchmarkConfig,
    workload: Workload,
    task: dict[str, Any],
    devices: tuple[torch.device, ...],
    parallel: ParallelContext | None,
) -> None:
    """Measure modelopt on Megatron-core if there is a parallel context, else on Hugging Face."""
    import calibration_modelopt

    def source(sizes: Workload) -> Any:
        if parallel is None:
            return calibration_modelopt.HuggingFaceModel(sizes, devices)
        return calibration_modelopt.MegatronModel(sizes, parallel)

    compiling = calibration_modelopt.start_compiling(devices[0])
    timer, results = Timer(devices, parallel), _results_file(config, task, parallel)
    small = warm_up_workload(workload)
    warm_up_cases = list(calibration_modelopt.cases(small, source(small)))
    warm_up(warm_up_cases[:1], timer)  # the forward pass needs no extensions
    compiling.join()
    results.add("fact", key="CUDA extensions", value=calibration_modelopt.extensions_loaded())
    warm_up(warm_up_cases[1:], timer)
    runner = CaseRunner(timer, results, task["deadline"], workload.samples)
    model_source = source(workload)
    more = replace(workload, samples=workload.more_samples)
    runner.measure(list(calibration_modelopt.cases(workload, model_source)), [], workload.repeats)
    # Only on Megatron-core, the fastest config; others would take many minutes.
    if parallel is not None and more.samples:
        longest_first = sorted(
            calibration_modelopt.cases(more, model_source),
            key=lambda case: case.name != "int4_awq",
        )
        runner.measure(longest_first, [], 1)


def _results_file(
    config: BenchmarkConfig, task: dict[str, Any], parallel: ParallelContext | None
) -> ResultsFile:
    is_writer = parallel is None or parallel.rank == 0
    return ResultsFile(Path(task["results"]), config.name, is_writer)


PART_FUNCTIONS: dict[str, Callable[[BenchmarkConfig, Workload, dict[str, Any]], None]] = {
    "package": measure_package,
    "profile": measure_profile,
    "modelopt": measure_modelopt,
}


def main() -> None:
    """Measure the config that the command line names."""
    name, task_file = sys.argv[1:]
    os.dup2(2, 1)  # stdout is reserved for the report, and modelopt prints to it
    task = read_json(Path(task_file))
    config, workload = CONFIGS[name], Workload(**task["workload"])
    PART_FUNCTIONS[config.part](config, workload, task)
    log(f"{name}: finished")


if __name__ == "__main__":
    main()
