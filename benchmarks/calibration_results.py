"""Look up the results of benchmarks/calibration.py: medians over runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calibration_common import CONFIGS, BenchmarkConfig, Workload

Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Medians:
    """Medians over the runs of a case.

    seconds: wall time.
    file_seconds: seconds spent on files.
    runs: number of runs.
    peak_gb: largest peak memory of each GPU in GB.
    """

    seconds: float
    file_seconds: float
    runs: int
    peak_gb: tuple[float, ...]


class Results:
    """All lines of a results file, those of reused files included."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = lines
        self.setups = [line for line in lines if line["type"] == "setup"]
        self.workload = Workload(**self.setups[-1]["workload"])

    @property
    def sample_counts(self) -> list[int]:
        """Requested numbers of samples."""
        return [count for count in (self.workload.samples, self.workload.more_samples) if count]

    def of_type(self, line_type: str) -> list[Line]:
        """Return the lines of a type, in the order of measurement."""
        return [line for line in self.lines if line["type"] == line_type]

    def fact(self, config: str, key: str) -> Any:
        """Return the latest value of a fact, or None."""
        facts = self.of_type("fact")
        values = [f["value"] for f in facts if (f["config"], f["key"]) == (config, key)]
        return values[-1] if values else None

    def medians(self, config: str, case: str, samples: int | None = None) -> Medians | None:
        """Return the medians of a case, or None if it was not measured."""
        samples = self.workload.samples if samples is None else samples
        key = (config, case, samples)
        runs = [r for r in self.of_type("run") if (r["config"], r["case"], r["samples"]) == key]
        if not runs:
            return None
        return Medians(
            seconds=statistics.median(run["seconds"] for run in runs),
            file_seconds=statistics.median(run["file_seconds"] for run in runs),
            runs=len(runs),
            peak_gb=tuple(max(gpu) for gpu in zip(*(run["peak_gb"] for run in runs), strict=True)),
        )

    def configs(self, part: str) -> list[BenchmarkConfig]:
        """Return the configs of a part that have results."""
        names = {line["config"] for line in self.of_type("run")}
        return [
            config for config in CONFIGS.values() if config.part == part and config.name in names
        ]
