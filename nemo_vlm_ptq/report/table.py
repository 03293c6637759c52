"""The table that closes a run: one line per format, everything a decision needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOT_RUN = "not run"
HEADER = ("format", "GQA", "change", "95 % interval", "p", "sight", "ratio", "verify")
LEFT = ("format", "sight", "verify")  # columns of words


def summarize(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table from a report's facts (see page.write_report); None where not run.

    The first is the 16 bit model, which nothing is compared with.
    """
    baseline = facts.get("baseline") or {}
    rows = [{"format": "16 bit", "baseline": True, "gqa": _accuracy(baseline)}]
    for item in facts.get("formats") or ():
        pair, size, whole = item.get("comparison") or {}, item.get("bytes"), baseline.get("bytes")
        rows.append({
            "format": item["name"],
            "gqa": _accuracy(item),
            "change": pair.get("difference"),
            "interval": pair.get("interval"),
            "p_value": pair.get("p_value"),
            "sight": (item.get("verdict") or NOT_RUN).partition(":")[0],
            "ratio": size / whole if size is not None and whole else None,
            "verify": (item.get("verify") or {}).get("passed"),
        })  # fmt: skip
    return rows


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One row as text, in the order of HEADER.

    Args:
        row: format; gqa in percent; change: points against 16 bit, interval: two of them; p_value;
            sight: the word of it; verify: bool; ratio: bytes against 16 bit. All but the format may
            be missing or None: not run. A row with `baseline` has nothing behind its gqa.
    """
    first = (str(row["format"]), percent(row.get("gqa")))
    if row.get("baseline"):
        return (*first, *[""] * (len(HEADER) - 2))
    change, interval, ratio = (row.get(key) for key in ("change", "interval", "ratio"))
    return (
        *first,
        NOT_RUN if change is None else f"{change:+.2f}",
        NOT_RUN if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}",
        chance(row.get("p_value")),
        str(row.get("sight") or NOT_RUN),
        NOT_RUN if ratio is None else f"{ratio:.2f}x",
        choose(row.get("verify"), "passed", "FAILED"),
    )


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """The whole table, aligned, at most 100 columns wide; changes are in points."""
    lines = [HEADER, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    texts = []
    for line in lines:
        parts = [
            cell.ljust(width) if name in LEFT else cell.rjust(width)
            for name, cell, width in zip(HEADER, line, widths, strict=True)
        ]
        texts.append("  ".join(parts).rstrip())
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([texts[0], rule, *texts[1:]])


def chance(value: float | None) -> str:
    """A p value, or "not run"."""
    if value is None:
        return NOT_RUN
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def percent(value: float | None, digits: int = 2) -> str:
    """A share in percent, or "not run"."""
    return NOT_RUN if value is None else f"{value:.{digits}f} %"


def choose(value: bool | None, yes: str, no: str) -> str:
    """A word for a verdict, or "not run"."""
    return NOT_RUN if value is None else yes if value else no


def size_text(size: int) -> str:
    """Bytes in the decimal unit that leaves one to three digits before the point."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{size} B" if unit == "B" else f"{value:.2f} {unit}"


def _accuracy(item: Mapping[str, Any]) -> float | None:
    return (item.get("accuracy") or {}).get("accuracy")
