"""Tables of benchmarks/calibration.py that compare: with modelopt, the plain forward and aims."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from calibration_setting import ALL, FORWARD, PRESETS, Point
from calibration_table import ONE, Figure, Table

# (sum, times the plain forward of the same ranks, times as fast as modelopt's best)
AIMS = (
    ("fp8", 1.15, 5.0),
    ("int8_sq", 1.15, 5.0),
    ("int4_awq", 3.0, 15.0),
    (ALL, 4.0, None),
)
SPEEDUP = 1.9  # of two GPUs over one


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def prose(text: str) -> str:
    """A paragraph in lines of even length."""
    return textwrap.fill(" ".join(text.split()), 110, break_on_hyphens=False)


def ratio(value: float, base: Figure | None) -> str:
    """How many times a figure, or "-" without one."""
    return "-" if base is None or not base.seconds else f"{value / base.seconds:.2f}"


def against(table: Table) -> str:
    """The formats that both calibrate: ours beside the best of modelopt, or "" with one alone."""
    ours, rows = table.points("ours"), []
    for samples in table.counts:
        for name in PRESETS:
            best = _best(table, name, samples)
            if best is None or not ours:
                continue
            row = [name, str(samples), f"{best[1].seconds:.2f} ({best[0].about})"]
            for point in ours:
                own = table.figure(point.name, name, samples)
                times = f" ({best[1].seconds / own.seconds:.1f} x faster)" if own else ""
                row.append(f"{own.seconds:.2f}{times}" if own else "-")
            rows.append(row)
    head = ["format", "samples", "best of modelopt, s", *(f"ours, {one.about}, s" for one in ours)]
    return f"The same formats from both:\n\n{markdown(head, rows)}" if rows else ""


def _best(table: Table, name: str, samples: int) -> tuple[Point, Figure] | None:
    """The fastest of modelopt's points for a format."""
    points = table.points("modelopt")
    found = [(p, f) for p in points if (f := table.figure(p.name, name, samples)) is not None]
    return min(found, key=lambda pair: pair[1].seconds) if found else None


def aims(table: Table) -> str:
    """A line for every aim and number of samples, a column for every set of ranks."""
    points, rows = table.points("ours"), []
    for samples in table.counts:
        for name, limit, times in AIMS:
            aim = f"{name}, {samples} samples: at most {limit:g} x the plain forward"
            rows.append([aim, *(_against_forward(table, p, name, samples, limit) for p in points)])
            if times is not None and (best := _best(table, name, samples)) is not None:
                aim = f"{name}, {samples} samples: {times:g} x faster than modelopt"
                own = [table.figure(point.name, name, samples) for point in points]
                rows.append([aim, *(_faster(figure, best[1], times) for figure in own)])
        for name in ("fp8", "int4_awq", ALL):
            alone = table.figure(ONE, name, samples)
            cells = [
                _faster(table.figure(p.name, name, samples), alone, SPEEDUP)
                if p.ranks == 2
                else "-"
                for p in points
            ]
            rows.append([f"{name}, {samples} samples: two GPUs at least {SPEEDUP:g} x one", *cells])
    head = ["aim", *(point.about for point in points)]
    about = "What is reached; in brackets without files."
    return f"## Aims\n\n{about}\n\n{markdown(head, rows)}"


def _against_forward(table: Table, point: Point, name: str, samples: int, limit: float) -> str:
    own = table.figure(point.name, name, samples)
    plain = table.figure(point.name, FORWARD, samples)
    if own is None or plain is None:
        return "-"
    bare = ratio(own.seconds - own.files, plain)
    return f"{ratio(own.seconds, plain)} ({bare}) {_met(own.seconds <= limit * plain.seconds)}"


def _faster(own: Figure | None, other: Figure | None, times: float) -> str:
    if own is None or other is None:
        return "-"
    reached = other.seconds / own.seconds
    return f"{reached:.2f} {_met(reached >= times)}"


def _met(reached: bool) -> str:
    return "met" if reached else "**missed**"
