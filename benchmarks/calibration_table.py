"""The numbers of benchmarks/calibration.py looked up: medians of runs, and sums of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calibration_setting import (
    FIVE,
    FROM_MAXIMA,
    MAXIMA,
    MOMENTS,
    POINTS,
    SOLVE_ALL,
    Point,
    Setting,
    solve_name,
)

Line = dict[str, Any]
ONE = "ours-1"
ALL = "all five"
# What a user asks for -> what is run for it.
SUMS: dict[str, tuple[str, ...]] = {
    **{name: (MOMENTS, solve_name(name)) for name in FIVE},
    **{name: (MAXIMA, solve_name(name, maxima=True)) for name in FROM_MAXIMA},
    ALL: (MOMENTS, SOLVE_ALL),
}


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

    def of_kind(self, kind: str) -> list[Line]:
        """Lines in the order they were measured."""
        return [line for line in self.lines if line["kind"] == kind]

    def fact(self, point: str, key: str) -> Any:
        """The latest value, or None."""
        facts = self.of_kind("fact")
        values = [f["value"] for f in facts if (f["point"], f["key"]) == (point, key)]
        return values[-1] if values else None

    def find(self, point: str, what: str, samples: int | None = None) -> Figure | None:
        """Of a sum where this project has one of that name, else of a case; None: not measured."""
        ours = POINTS[point].part == "ours"
        return (self.together if ours and what in SUMS else self.figure)(point, what, samples)

    def figure(self, point: str, what: str, samples: int | None = None) -> Figure | None:
        """Of a case, or None when it was not measured; solve does not depend on the samples."""
        if samples is None or what.startswith("solve"):
            samples = self.setting.samples
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

    def together(self, point: str, name: str, samples: int | None = None) -> Figure | None:
        """A sum of SUMS."""
        parts = [self.figure(point, what, samples) for what in SUMS[name]]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return Figure(
            sum(part.seconds for part in known),
            sum(part.files for part in known),
            min(part.runs for part in known),
            tuple(max(gpu) for gpu in zip(*(part.peaks for part in known), strict=True)),
        )

    def points(self, part: str) -> list[Point]:
        """Points of a part that have numbers."""
        names = {line["point"] for line in self.of_kind("run")}
        return [point for point in POINTS.values() if point.part == part and point.name in names]
