"""The numbers of benchmarks/calibration.py looked up: medians of runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calibration_setting import POINTS, Point, Setting

Line = dict[str, Any]
ONE = "ours-1"


@dataclass(frozen=True)
class Figure:
    """Medians: seconds, and of these files; how many runs at least; GB at most on each GPU."""

    seconds: float
    files: float
    runs: int
    peaks: tuple[float, ...]


class Table:
    """Everything that was measured: the lines of one command and of those it took along."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = lines
        self.setup = [line for line in lines if line["kind"] == "setup"]
        self.setting = Setting(**self.setup[-1]["setting"])

    @property
    def counts(self) -> list[int]:
        """Numbers of samples that were asked for."""
        return [count for count in (self.setting.samples, self.setting.more_samples) if count]

    def of_kind(self, kind: str) -> list[Line]:
        """Lines in the order they were measured."""
        return [line for line in self.lines if line["kind"] == kind]

    def fact(self, point: str, key: str) -> Any:
        """The latest value, or None."""
        facts = self.of_kind("fact")
        values = [f["value"] for f in facts if (f["point"], f["key"]) == (point, key)]
        return values[-1] if values else None

    def figure(self, point: str, what: str, samples: int | None = None) -> Figure | None:
        """Of a case, or None when it was not measured."""
        samples = self.setting.samples if samples is None else samples
        wanted = (point, what, samples)
        runs = [r for r in self.of_kind("run") if (r["point"], r["what"], r["samples"]) == wanted]
        if not runs:
            return None
        return Figure(
            statistics.median(run["seconds"] for run in runs),
            statistics.median(run["files"] for run in runs),
            len(runs),
            tuple(max(gpu) for gpu in zip(*(run["peaks"] for run in runs), strict=True)),
        )

    def points(self, part: str) -> list[Point]:
        """Points of a part that have numbers."""
        names = {line["point"] for line in self.of_kind("run")}
        return [point for point in POINTS.values() if point.part == part and point.name in names]
