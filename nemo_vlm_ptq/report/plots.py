"""Plots of the report as PNG files.

Colours are Okabe and Ito's colour-blind safe palette; series differ in marker and dash as well.
matplotlib is imported on use, because it is slow to import.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_vlm_ptq.report.table import size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6B6B6B"
SERIES = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"),
    ("#56B4E9", "P"), ("#000000", "X"), ("#6B6B6B", "<"),
)  # fmt: skip
DASHES = ("-", "--", ":")  # of the first, second and third cycle through SERIES
LINEAR_ORDER = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
}
DPI = 150
MAX_HORIZONTAL_LABELS = 7  # more tick labels than this are rotated
LEGEND_COLUMNS = 5
FIGURE_WIDTH = 9.2  # inches, the same for all figures, so that font sizes match on the page


def plot_accuracy(facts: Mapping[str, Any], path: Path) -> bool:
    """Plot accuracy with 95 % intervals, with own and with swapped images.

    Args:
        facts: facts of the report (see page.write_report).
        path: the PNG to write.

    Returns:
        False if there are no scores and no file was written.
    """
    from matplotlib import rc_context

    groups = [("16 bit", facts.get("baseline") or {})]
    groups += [(item["name"], item) for item in facts.get("formats") or ()]
    groups = [(name, item) for name, item in groups if item.get("accuracy") or item.get("swapped")]
    if not groups:
        return False
    with rc_context(STYLE):
        figure = _figure(4.0)
        axes = figure.add_subplot()
        _plot_scores(axes, [item.get("accuracy") for _, item in groups], -0.1, "own image")
        _plot_scores(axes, [item.get("swapped") for _, item in groups], 0.1, "swapped image")
        names = [name for name, _ in groups]
        label_style: Any = {}
        if len(groups) > MAX_HORIZONTAL_LABELS:
            label_style = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(groups)), names, **label_style)
        axes.set_xlim(-0.5, len(groups) - 0.35)
        axes.set_ylim(*_score_limits([item for _, item in groups]))
        axes.set_ylabel("GQA accuracy, %")
        axes.grid(visible=False, axis="x")
        figure.legend(loc="outside upper center", ncols=2)
        figure.savefig(path, dpi=DPI)
    return True


def plot_bytes(facts: Mapping[str, Any], path: Path) -> bool:
    """Plot the checkpoint size of each format and of 16 bit.

    Returns:
        False if there are no sizes and no file was written.
    """
    from matplotlib import rc_context

    baseline_size = (facts.get("baseline") or {}).get("bytes")
    sizes = [(f["name"], f["bytes"]) for f in facts.get("formats") or () if f.get("bytes")]
    sizes = ([("16 bit", baseline_size)] if baseline_size else []) + sizes
    if not sizes:
        return False
    names, values = [name for name, _ in sizes], [size for _, size in sizes]
    labels = [
        size_text(size)
        + (f"  ({size / baseline_size:.2f}x)" if baseline_size and name != "16 bit" else "")
        for name, size in sizes
    ]
    with rc_context(STYLE):
        figure = _figure(0.4 * len(sizes) + 0.4)
        axes = figure.add_subplot()
        colors = [GREY if name == "16 bit" else BLUE for name in names]
        bars = axes.barh(names, values, color=colors, height=0.62)
        axes.bar_label(bars, labels, padding=5)
        axes.set_xlim(0, 1.3 * max(values))
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.tick_params(left=False, bottom=False, labelbottom=False)
        axes.spines["bottom"].set_visible(False)
        figure.savefig(path, dpi=DPI)
    return True


def plot_layers(facts: Mapping[str, Any], path: Path) -> bool:
    """Plot relative output errors over the layers: one panel per linear name, one line per format.

    Errors of 0 (layers kept in 16 bit) and non-finite errors are omitted from the logarithmic axis.

    Returns:
        False if there is nothing to plot and no file was written.
    """
    from matplotlib import rc_context
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    formats = [item for item in facts.get("formats") or () if item.get("layers")]
    linears = ordered_linears(entry["linear"] for item in formats for entry in item["layers"])
    errors = [entry["error"] for item in formats for entry in item["layers"]]
    errors = [error for error in errors if _is_plottable(error)]
    if not errors:
        return False
    low, high = _log_limits(min(errors), max(errors))
    steps = (1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)
    rows = math.ceil(len(linears) / 2)
    with rc_context(STYLE):
        figure = _figure(2.5 * rows + 0.6 + 0.25 * -(-len(formats) // LEGEND_COLUMNS))
        panels = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False)
        for axes, linear in zip(panels.flat, linears, strict=False):
            _plot_layer_lines(axes, formats, linear)
            axes.set_title(linear, loc="left", fontsize=10)
            axes.set_yscale("log")
            axes.set_ylim(low, high)
            axes.yaxis.set_major_locator(LogLocator(subs=steps))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in panels.flat[len(linears) :]:
            axes.set_visible(False)
        figure.supxlabel("layer", fontsize=10)
        figure.supylabel("relative output error", fontsize=10)
        handles, labels = panels.flat[0].get_legend_handles_labels()
        columns = min(LEGEND_COLUMNS, len(labels))
        figure.legend(handles, labels, loc="outside upper center", ncols=columns)
        figure.savefig(path, dpi=DPI)
    return True


def ordered_linears(linears: Iterable[str]) -> list[str]:
    """Return the distinct names of linears in forward order, unknown names last."""
    names = set(linears)
    return [name for name in LINEAR_ORDER if name in names] + sorted(names.difference(LINEAR_ORDER))


def _figure(height: float) -> Figure:
    """Create an empty figure that renders without a display; height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(FIGURE_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plot_scores(axes: Axes, scores: Sequence[Any], shift: float, label: str) -> None:
    """Plot one point and its interval per group; the first group's value is also a dashed line."""
    color, marker = (BLUE, "o") if shift < 0 else (ORANGE, "s")
    positions = [i for i, score in enumerate(scores) if score]
    for i in positions:
        value, (low, high) = scores[i]["accuracy"], scores[i]["interval"]
        axes.errorbar(
            i + shift, value, [[max(0.0, value - low)], [max(0.0, high - value)]],
            color=color, marker=marker, markersize=6, capsize=4, linestyle="none",
            label=f"{label}, 95 % interval" if i == positions[0] else None,
        )  # fmt: skip
        offset, align = (-9, "right") if shift < 0 else (9, "left")
        axes.annotate(
            f"{value:.1f}", (i + shift, value), (offset, 0), textcoords="offset points",
            ha=align, va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    if positions and positions[0] == 0 and len(scores) > 1:
        axes.axhline(scores[0]["accuracy"], color=color, linestyle="--", linewidth=0.9, alpha=0.6)


def _score_limits(items: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the limits of the accuracy axis in percent, with a margin around all intervals."""
    scores = [item[key] for item in items for key in ("accuracy", "swapped") if item.get(key)]
    low = min(score["interval"][0] for score in scores)
    high = max(score["interval"][1] for score in scores)
    margin = max(2.0, 0.08 * (high - low))
    return max(0.0, low - margin), min(102.0, high + margin)


def _plot_layer_lines(axes: Axes, formats: Sequence[Mapping[str, Any]], linear: str) -> None:
    """Plot the lines of one panel."""
    for i, item in enumerate(formats):
        (color, marker), dashes = SERIES[i % len(SERIES)], DASHES[i // len(SERIES) % len(DASHES)]
        entries = sorted(
            (entry["layer"], entry["error"])
            for entry in item["layers"]
            if entry["linear"] == linear
        )
        errors = [error if _is_plottable(error) else math.nan for _, error in entries]
        axes.plot(
            [layer for layer, _ in entries], errors, color=color, marker=marker,
            markersize=4, linewidth=1.4, linestyle=dashes, label=item["name"],
        )  # fmt: skip


def _log_limits(low: float, high: float) -> tuple[float, float]:
    """Return the nearest values of 1, 2 or 5 times a power of ten below and above."""
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in (1, 2, 5)]
    return max(t for t in ticks if t < low), min(t for t in ticks if t > high)


def _is_plottable(error: float | None) -> bool:
    return error is not None and math.isfinite(error) and error > 0
