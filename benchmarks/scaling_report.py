"""The report of benchmarks/scaling.py: tables in markdown, and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PHASES = {
    "import": "import",
    "observe": "observe, maxima",
    "calibrate": "observe, second moments, and solve",
    "export": "export",
}
PARTS = {  # folders of the third phase
    "statistics": "of it observe",
    "int4_awq/scales": "solve after it",
    "int4_awq/quantized": "Megatron checkpoint",
}
REST = "hashes and the rest"
COLORS = ("#B8B8B8", "#9CC3E6", "#2E75B6", "#1B3F66", "#F2B36B", "#DCD2C4", "#8FBF7F")

Lines = Sequence[Mapping[str, Any]]


class Measured:
    """All runs of a model at a layout (tensor, pipeline, data)."""

    def __init__(self, point: str, lines: Lines) -> None:
        self.point = point
        self.tensor, self.pipeline, self.data = map(int, point.split("x"))
        self.ranks = self.tensor * self.pipeline * self.data
        self.runs = [line for line in lines if "phases" in line]
        self.profiles = [line["profile"] for line in lines if "profile" in line]

    def clock(self, phase: str) -> float:
        """Median of a phase's seconds, all included."""
        return statistics.median(run["phases"][phase]["clock"] for run in self.runs)

    def part(self, phase: str, folder: str) -> float:
        """Median of the seconds of a folder that a phase leaves, until its files are written."""
        return statistics.median(run["phases"][phase]["seconds"][folder] for run in self.runs)

    def rest(self, phase: str) -> float:
        """Seconds of a phase beside its folders'."""
        return self.clock(phase) - sum(self.part(phase, one) for one in PARTS)

    def peaks(self, phase: str) -> list[float]:
        """GB of each rank at most."""
        return [one / 1e9 for one in self.runs[-1]["phases"][phase]["peak"]]

    def sent(self, phase: str) -> list[float]:
        """GB that each rank sent."""
        return [sum(one.values()) / 1e9 for one in self.runs[-1]["phases"][phase]["sent"]]

    @property
    def name(self) -> str:
        """The layout in words."""
        return f"TP {self.tensor} x PP {self.pipeline} x DP {self.data}"

    @property
    def short(self) -> str:
        """The kinds of ranks that there are several of."""
        sizes = {"TP": self.tensor, "PP": self.pipeline, "DP": self.data}
        return " x ".join(f"{kind} {size}" for kind, size in sizes.items() if size > 1) or "1 rank"


PLOTTED: dict[str, Callable[[Measured], float]] = {
    "import": lambda one: one.clock("import"),
    "observe, maxima": lambda one: one.clock("observe"),
    "observe, second moments": lambda one: one.part("calibrate", "statistics"),
    "solve after it": lambda one: one.part("calibrate", "int4_awq/scales"),
    "Megatron checkpoint": lambda one: one.part("calibrate", "int4_awq/quantized"),
    REST: lambda one: one.rest("calibrate"),
    "export, TP 2": lambda one: one.clock("export"),
}


def by_model(lines: Lines) -> dict[str, list[Measured]]:
    """Model -> its layouts, few ranks first."""
    found: dict[str, list[Measured]] = {}
    for name in dict.fromkeys(line["name"] for line in lines):
        own = [line for line in lines if line["name"] == name]
        points = dict.fromkeys(line["point"] for line in own)
        made = [Measured(one, [line for line in own if line["point"] == one]) for one in points]
        found[name] = sorted((one for one in made if one.runs), key=lambda one: one.ranks)
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def times(points: Sequence[Measured]) -> list[str]:
    """Seconds of every phase, and how many times as fast as the fewest ranks."""
    base, rows = points[0], []
    for one in points:
        cells = [one.name, str(one.ranks), str(len(one.runs))]
        for phase in PHASES:
            cells.append(f"{one.clock(phase):.2f}")
            if phase in ("observe", "calibrate"):
                faster = base.clock(phase) / one.clock(phase)
                share = 100 * faster * base.ranks / one.ranks
                cells.append(f"{faster:.2f} x ({share:.0f} %)")
                if phase == "calibrate":
                    cells += [f"{one.part(phase, part):.2f}" for part in PARTS]
                    cells.append(f"{one.rest(phase):.2f}")
        rows.append(cells)
    head = ["layout", "ranks", "runs", PHASES["import"], PHASES["observe"], "speed-up"]
    head += [PHASES["calibrate"], "speed-up", *PARTS.values(), REST, PHASES["export"]]
    about = "Seconds, medians; speed-ups over the first row, in brackets the share of the ideal."
    return [about, "", *table(head, rows)]


def memory(points: Sequence[Measured]) -> list[str]:
    """GPU memory against what the plan said."""
    if not any(points[0].peaks("observe")):
        return []
    rows = []
    for one in points:
        cells = [one.name, str(one.runs[-1]["phases"]["calibrate"]["passes"])]
        for phase in ("observe", "calibrate"):
            peaks, said = one.peaks(phase), one.runs[-1]["phases"][phase]["forecast"] / 1e9
            cells += [" / ".join(f"{peak:.1f}" for peak in peaks), f"{said:.1f}"]
            cells.append(f"{100 * (said / max(peaks) - 1):+.0f} %")
        rows.append(cells)
    head = ["layout", "passes for second moments"]
    for phase in ("maxima", "second moments"):
        head += [f"{phase}: peak of each rank", "forecast", "off"]
    return ["GPU memory, GB:", "", *table(head, rows)]


def traffic(points: Sequence[Measured]) -> list[str]:
    """GB that a rank sent, at most, by phase."""
    rows = [
        [one.name, *(f"{max(one.sent(phase)):.3f}" for phase in PHASES)]
        for one in points
        if one.ranks > 1
    ]
    about = "GB that a rank sent, at most:"
    return [about, "", *table(["layout", *PHASES.values()], rows)] if rows else []


def hashes(points: Sequence[Measured]) -> list[str]:
    """Whether packed weights are those of the first row's."""
    base = points[0]
    own = base.runs[0]["sha256"]
    rows = [
        [one.name, "the same" if all(run["sha256"] == own for run in one.runs) else "others"]
        for one in points
    ]
    return table(["layout", f"sha256 of the int4_awq checkpoint, against {base.name}"], rows)


def profiles(points: Sequence[Measured]) -> Iterator[str]:
    """The longest kernels of the first rank."""
    for one in points:
        for seen in one.profiles:
            spent = f"{seen['total']:.2f} s in kernels and copies of {seen['wall']:.2f} s"
            yield f"{one.name}, observe and solve on the first rank: {spent} by the clock.\n"
            rows = [
                [f"`{name[:70]}`", str(count), f"{time:.3f}"] for name, count, time in seen["rows"]
            ]
            yield from table(["kernel", "calls", "s"], rows)


def report(lines: Lines, left: Mapping[str, Mapping[str, str]]) -> str:
    """The page; left: model -> point -> why it was not measured."""
    text: list[str] = []
    for name, points in by_model(lines).items():
        setting = points[0].runs[0]
        text += [f"## {name}", ""]
        about = f"{setting['samples']} samples, layers: {setting['layers'] or 'all'}"
        text += [f"{setting['machine']}; {about}.", ""]
        text += times(points)
        text += [*memory(points), *traffic(points), *hashes(points), *profiles(points)]
        missing = left.get(name, {})
        text += [f"Not measured: {point}, {why}." for point, why in missing.items()]
    return "\n".join(text)


def plot(lines: Lines, path: Path) -> None:
    """Where the seconds of each layout go, and how many times as fast the third phase is."""
    from matplotlib.figure import Figure

    models = by_model(lines)
    rows = [1.2 + 0.42 * len(points) for points in models.values()]
    figure = Figure((8.6, sum(rows)), layout="constrained")
    panels = figure.subplots(len(models), 1, squeeze=False, sharex=True, height_ratios=rows)[:, 0]
    for axes, (name, points) in zip(panels, models.items(), strict=True):
        base, left = points[0], [0.0] * len(points)
        for (label, seconds), color in zip(PLOTTED.items(), COLORS, strict=True):
            widths = [seconds(one) for one in points]
            axes.barh(range(len(points)), widths, 0.7, left, label=label, color=color)
            left = [sum(pair) for pair in zip(left, widths, strict=True)]
        for row, (one, end) in enumerate(zip(points, left, strict=True)):
            faster = base.clock("calibrate") / one.clock("calibrate")
            if one is not base:
                axes.text(end, row, f" {faster:.2f} x", va="center", fontsize=9)
        axes.set_yticks(range(len(points)), [one.short for one in points])
        axes.set_title(name, loc="left")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("seconds; x: as fast as the first, from second moments to checkpoint")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
