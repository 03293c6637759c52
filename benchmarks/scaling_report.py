"""Format the results of benchmarks/scaling.py as markdown tables and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PHASE_TITLES = {
    "maxima": "observe and solve, fp8",
    "search": "observe and solve, int4_awq",
    "export": "export",
}
SEARCH_FOLDERS = {  # stage folder of the phase search -> column
    "statistics": "of which observe",
    "int4_awq/scales": "solve after observe",
}
REMAINDER = "start and hashing"
COLORS = ("#9CC3E6", "#2E75B6", "#8FBF7F")

Lines = Sequence[Mapping[str, Any]]


class LayoutResults:
    """All runs of a model in one layout."""

    def __init__(self, layout: str, lines: Lines) -> None:
        self.layout = layout
        self.tensor, self.pipeline, self.data = map(int, layout.split("x"))
        self.world_size = self.tensor * self.pipeline * self.data
        self.runs = [line for line in lines if "phases" in line]
        self.profiles = [line["profile"] for line in lines if "profile" in line]

    def wall_seconds(self, phase: str) -> float:
        """Return the median wall time of a phase."""
        return statistics.median(run["phases"][phase]["wall"] for run in self.runs)

    def folder_seconds(self, phase: str, folder: str) -> float:
        """Return the median seconds of one stage folder of a phase, without hashing."""
        return statistics.median(run["phases"][phase]["seconds"][folder] for run in self.runs)

    def remaining_seconds(self, phase: str) -> float:
        """Return the wall time of a phase that is not in the seconds of its folders."""
        folders = sum(self.folder_seconds(phase, folder) for folder in SEARCH_FOLDERS)
        return self.wall_seconds(phase) - folders

    def peak_gigabytes(self, phase: str) -> list[float]:
        """Return the peak GPU memory of each rank in GB."""
        return [peak / 1e9 for peak in self.runs[-1]["phases"][phase]["peak"]]

    def sent_gigabytes(self, phase: str) -> list[float]:
        """Return the GB sent by each rank."""
        return [sum(sent.values()) / 1e9 for sent in self.runs[-1]["phases"][phase]["sent"]]

    @property
    def name(self) -> str:
        """The layout with all axes."""
        return f"TP {self.tensor} x PP {self.pipeline} x DP {self.data}"

    @property
    def short_name(self) -> str:
        """The layout without axes of size 1."""
        sizes = {"TP": self.tensor, "PP": self.pipeline, "DP": self.data}
        return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1 rank"


PLOTTED: dict[str, Callable[[LayoutResults], float]] = {
    "observe and solve, fp8": lambda results: results.wall_seconds("maxima"),
    "observe and solve, int4_awq": lambda results: results.wall_seconds("search"),
    "export, int4_awq": lambda results: results.wall_seconds("export"),
}


def group_by_model(lines: Lines) -> dict[str, list[LayoutResults]]:
    """Return model -> results of its layouts, by ascending world size."""
    models: dict[str, list[LayoutResults]] = {}
    for name in dict.fromkeys(line["name"] for line in lines):
        model_lines = [line for line in lines if line["name"] == name]
        layouts = [
            LayoutResults(layout, [line for line in model_lines if line["layout"] == layout])
            for layout in dict.fromkeys(line["layout"] for line in model_lines)
        ]
        measured = (results for results in layouts if results.runs)
        models[name] = sorted(measured, key=lambda results: results.world_size)
    return models


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a markdown table and an empty line."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def seconds_table(layouts: Sequence[LayoutResults]) -> list[str]:
    """Return the seconds of every phase, and speedups over the smallest world size."""
    base, rows = layouts[0], []
    for results in layouts:
        cells = [results.name, str(results.world_size), str(len(results.runs))]
        for phase in PHASE_TITLES:
            cells.append(f"{results.wall_seconds(phase):.2f}")
            if phase in ("maxima", "search"):
                speedup = base.wall_seconds(phase) / results.wall_seconds(phase)
                efficiency = 100 * speedup * base.world_size / results.world_size
                cells.append(f"{speedup:.2f} x ({efficiency:.0f} %)")
            if phase == "search":
                cells += [
                    f"{results.folder_seconds(phase, folder):.2f}" for folder in SEARCH_FOLDERS
                ]
                cells.append(f"{results.remaining_seconds(phase):.2f}")
        rows.append(cells)
    head = ["layout", "ranks", "runs", PHASE_TITLES["maxima"], "speedup"]
    head += [PHASE_TITLES["search"], "speedup", *SEARCH_FOLDERS.values(), REMAINDER]
    head.append(PHASE_TITLES["export"])
    note = "Median seconds; speedup over the first row, parallel efficiency in parentheses."
    return [note, "", *markdown_table(head, rows)]


def memory_table(layouts: Sequence[LayoutResults]) -> list[str]:
    """Return the peak GPU memory and the plan's forecast."""
    if not any(layouts[0].peak_gigabytes("search")):
        return []
    rows = []
    for results in layouts:
        phases = results.runs[-1]["phases"]
        cells = [results.name]
        for phase in ("maxima", "search"):
            cells.append(str(phases[phase]["windows"]))
            peaks, forecast = results.peak_gigabytes(phase), phases[phase]["forecast"] / 1e9
            cells += [" / ".join(f"{peak:.1f}" for peak in peaks), f"{forecast:.1f}"]
            cells.append(f"{100 * (forecast / max(peaks) - 1):+.0f} %")
        rows.append(cells)
    head = ["layout"]
    for fmt in ("fp8", "int4_awq"):
        head += [f"{fmt}: windows", "peak of each rank", "forecast", "error of the forecast"]
    return ["GPU memory, GB:", "", *markdown_table(head, rows)]


def traffic_table(layouts: Sequence[LayoutResults]) -> list[str]:
    """Return the largest number of GB that a rank sent in each phase."""
    rows = [
        [results.name, *(f"{max(results.sent_gigabytes(phase)):.3f}" for phase in PHASE_TITLES)]
        for results in layouts
        if results.world_size > 1
    ]
    table = markdown_table(["layout", *PHASE_TITLES.values()], rows)
    return ["GB sent by a rank, largest of all ranks:", "", *table] if rows else []


def hashes_table(layouts: Sequence[LayoutResults]) -> list[str]:
    """Return whether the exports of each layout equal those of the first."""
    base = layouts[0]
    expected = base.runs[0]["sha256"]
    rows = []
    for results in layouts:
        is_equal = all(run["sha256"] == expected for run in results.runs)
        rows.append([results.name, "equal" if is_equal else "different"])
    head = ["layout", f"sha256 of the int4_awq export, compared with {base.name}"]
    return markdown_table(head, rows)


def profile_tables(layouts: Sequence[LayoutResults]) -> Iterator[str]:
    """Yield the lines of a table of the longest kernels on rank 0 for each profile."""
    for results in layouts:
        for profile in results.profiles:
            yield (
                f"{results.name}, observe and solve on rank 0: {profile['total']:.2f} s in kernels "
                f"and copies, wall time {profile['wall']:.2f} s.\n"
            )
            rows = [
                [f"`{name[:70]}`", str(count), f"{seconds:.3f}"]
                for name, count, seconds in profile["kernels"]
            ]
            yield from markdown_table(["kernel", "calls", "s"], rows)


def make_report(lines: Lines, skipped: Mapping[str, Mapping[str, str]]) -> str:
    """Return the page.

    Args:
        lines: lines of the results file.
        skipped: model -> layout -> why it was not measured.
    """
    text: list[str] = []
    for name, layouts in group_by_model(lines).items():
        setup = layouts[0].runs[0]
        text += [f"## {name}", ""]
        workload = f"{setup['samples']} samples, layers: {setup['layers'] or 'all'}, window: "
        workload += setup["window"]
        text += [f"{setup['machine']}; {workload}.", ""]
        text += seconds_table(layouts)
        text += [*memory_table(layouts), *traffic_table(layouts), *hashes_table(layouts)]
        text += profile_tables(layouts)
        reasons = skipped.get(name, {})
        text += [f"Not measured: {layout}, {reason}." for layout, reason in reasons.items()]
    return "\n".join(text)


def save_plot(lines: Lines, path: Path) -> None:
    """Plot the seconds of the stages in each layout, and the speedup of the search."""
    from matplotlib.figure import Figure

    models = group_by_model(lines)
    heights = [1.2 + 0.42 * len(layouts) for layouts in models.values()]
    figure = Figure((8.6, sum(heights)), layout="constrained")
    panels = figure.subplots(len(models), 1, squeeze=False, sharex=True, height_ratios=heights)[
        :, 0
    ]
    for axes, (name, layouts) in zip(panels, models.items(), strict=True):
        base, ends = layouts[0], [0.0] * len(layouts)
        for (label, seconds), color in zip(PLOTTED.items(), COLORS, strict=True):
            widths = [seconds(results) for results in layouts]
            axes.barh(range(len(layouts)), widths, 0.7, ends, label=label, color=color)
            ends = [sum(pair) for pair in zip(ends, widths, strict=True)]
        for row, (results, end) in enumerate(zip(layouts, ends, strict=True)):
            speedup = base.wall_seconds("search") / results.wall_seconds("search")
            if results is not base:
                axes.text(end, row, f" {speedup:.2f} x", va="center", fontsize=9)
        axes.set_yticks(range(len(layouts)), [results.short_name for results in layouts])
        axes.set_title(name, loc="left")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("seconds; x: speedup of observe and solve with a search")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
