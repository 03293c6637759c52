"""A rank of benchmarks/calibration.py, which starts it: measures one point into a file.

python benchmarks/calibration_rank.py POINT JOB.json
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
from calibration_setting import (
    POINTS,
    Case,
    Clock,
    Numbers,
    Point,
    Setting,
    log,
    matrix_rate,
)

from nemo_vlm_ptq.megatron.parallel_context import ParallelContext, parallel_context
from nemo_vlm_ptq.workdir.store import read_json

WARM_LAYERS = 2  # of the model on which everything runs once before it is measured
WARM_CHUNKS = 16
PROFILED_LAYERS = 8  # all layers are alike


def warm_setting(setting: Setting) -> Setting:
    """The same widths and micro-batches, but little of them."""
    samples = min(setting.samples, WARM_CHUNKS * setting.micro_batch)
    return replace(setting, layers=min(WARM_LAYERS, setting.layers), samples=samples)


def warm_up(cases: Sequence[Case], clock: Clock) -> None:
    """Everything once, unrecorded."""
    for case in cases:
        run = clock.run(case)
        log(f"warm-up, {case.what}: {run.failed or f'{run.seconds:.2f} s'}")


class Rounds:
    """Runs cases as often as there is time; `unit` is the number of samples of most."""

    def __init__(self, clock: Clock, numbers: Numbers, deadline: float, unit: int) -> None:
        self.clock, self.numbers, self.deadline, self.unit = clock, numbers, deadline, unit
        self._took: dict[str, tuple[float, float]] = {}  # all of a run, and its pass over the data
        self._broken: set[str] = set()

    def measure(self, cases: Sequence[Case], more: Sequence[Case], repeats: int) -> None:
        """All cases once, those of the other sample count if they fit, then repeats that fit."""
        again = repeats - 1
        for case in [*cases, *more, *(list(cases) * again), *(list(more) * again)]:
            name = f"{self.numbers.point}, {case.what}, {case.samples} samples"
            if case.what in self._broken:
                continue
            if not self._fits(case):
                log(f"{name}: no time left for it")
                continue
            begin = time.time()
            run = self.clock.run(case)
            self._took.setdefault(case.what, (time.time() - begin, run.seconds - run.files))
            self.numbers.add_run(case, run)
            self._broken |= {case.what} if run.failed else set()
            said = run.failed or f"{run.seconds:.2f} s, {run.files:.2f} of them files"
            log(f"{name}: {said}")

    def _fits(self, case: Case) -> bool:
        """There is time for it, by what it took before; the first rank decides."""
        if case.what not in self._took:
            return True
        whole, data = self._took[case.what]
        end = time.time() + whole + data * (case.samples / self.unit - 1)
        return self.clock.gather(end < self.deadline)[0]


def measure_ours(point: Point, setting: Setting, job: dict[str, Any]) -> None:
    """Observe and solve on these ranks."""
    from calibration_ours import Ours

    folder = Path(job["scratch"])
    with parallel_context({"tensor": point.tensor, "pipeline": 1, "data": point.data}) as own:
        clock, numbers = Clock([own.device], own), _numbers(point, job, own)
        warm = warm_setting(setting)
        warm_up(list(Ours(own, warm, folder).cases(warm.samples)), clock)
        clock.tidy()
        rates = clock.gather(matrix_rate(own.device))
        numbers.add("fact", key="rates", value=rates)
        ours = Ours(own, setting, folder)
        more = setting.more_samples
        rounds = Rounds(clock, numbers, job["deadline"], setting.samples)
        rounds.measure(
            list(ours.cases(setting.samples)),
            list(ours.cases(more, alone=False)) if more else [],
            setting.repeats,
        )
        own.barrier()
        numbers.add("fact", key="statistics", value=[ours.written(), ours.passes])
        numbers.add("fact", key="scales", value=ours.scales())


def measure_profile(point: Point, setting: Setting, job: dict[str, Any]) -> None:
    """Where the time of observe and of an AWQ solve goes."""
    from calibration_ours import Ours

    with parallel_context({"tensor": 1, "pipeline": 1, "data": 1}) as own:
        clock, numbers = Clock([own.device], own), _numbers(point, job, own)
        few = replace(setting, layers=min(PROFILED_LAYERS, setting.layers))
        ours = Ours(own, few, Path(job["scratch"]))
        for _ in ours.profiles():  # the first time warms up
            clock.tidy()
        for what, seen in ours.profiles():
            log(f"profile, {what}: {seen['wall']:.2f} s")
            numbers.add("profile", what=what, **seen)
            clock.tidy()


def measure_modelopt(point: Point, setting: Setting, job: dict[str, Any]) -> None:
    """modelopt's calibration, on a Hugging Face or on a Megatron-core model."""
    if not point.name.startswith("modelopt-tp"):
        names = ("cuda:0", "cuda:1") if torch.cuda.is_available() else ("cpu", "cpu")
        count = 2 if point.name == "modelopt-split" else 1
        devices = tuple(map(torch.device, names[:count]))
        _measure_modelopt(point, setting, job, devices, None)
        return
    with parallel_context({"tensor": point.tensor, "pipeline": 1, "data": 1}) as own:
        _measure_modelopt(point, setting, job, (own.device,), own)


def _measure_modelopt(
    point: Point,
    setting: Setting,
    job: dict[str, Any],
    devices: tuple[torch.device, ...],
    own: ParallelContext | None,
) -> None:
    import calibration_modelopt as theirs

    def path(sizes: Setting) -> Any:
        return theirs.HuggingFace(sizes, devices) if own is None else theirs.Megatron(sizes, own)

    compiling = theirs.start_compiling(devices[0])
    clock, numbers = Clock(devices, own), _numbers(point, job, own)
    warm = warm_setting(setting)
    warm_cases = list(theirs.cases(warm, path(warm)))
    warm_up(warm_cases[:1], clock)  # nothing in it needs the extensions
    compiling.join()
    numbers.add("fact", key="CUDA extensions", value=theirs.extensions_loaded())
    warm_up(warm_cases[1:], clock)
    rounds = Rounds(clock, numbers, job["deadline"], setting.samples)
    whole, more = path(setting), replace(setting, samples=setting.more_samples)
    rounds.measure(list(theirs.cases(setting, whole)), [], setting.repeats)
    if own is not None and more.samples:  # the fastest path; others would take many minutes
        longest_first = sorted(theirs.cases(more, whole), key=lambda case: case.what != "int4_awq")
        rounds.measure(longest_first, [], 1)


def _numbers(point: Point, job: dict[str, Any], own: ParallelContext | None) -> Numbers:
    return Numbers(Path(job["numbers"]), point.name, own is None or own.rank == 0)


BY_PART: dict[str, Callable[[Point, Setting, dict[str, Any]], None]] = {
    "ours": measure_ours,
    "profile": measure_profile,
    "modelopt": measure_modelopt,
}


def main() -> None:
    """Measure the point that the command line names."""
    name, job_file = sys.argv[1:]
    os.dup2(2, 1)  # stdout is for the report, and modelopt prints
    job = read_json(Path(job_file))
    point, setting = POINTS[name], Setting(**job["setting"])
    BY_PART[point.part](point, setting, job)
    log(f"{name} is done")


if __name__ == "__main__":
    main()
