"""Summary table at the end of a run: one line per format with all results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOT_RUN = "not run"
HEADER = ("format", "GQA", "change", "95 % interval", "p", "sight", "ratio", "verify")
LEFT_ALIGNED = ("format", "sight", "verify")  # text columns


def summarize(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Build the table's rows from a report's facts (see page.write_report); None if not run.

    The first row is the 16-bit model, which has an accuracy only.
    """
    baseline = facts.get("baseline") or {}
    rows = [{"format": "16 bit", "baseline": True, "gqa": _accuracy(baseline)}]
    for item in facts.get("formats") or ():
        comparison = item.get("comparison") or {}
        size, baseline_size = item.get("bytes"), baseline.get("bytes")
        rows.append({
            "format": item["name"],
            "gqa": _accuracy(item),
            "change": comparison.get("difference"),
            "interval": comparison.get("interval"),
            "p_value": comparison.get("p_value"),
            "sight": (item.get("verdict") or NOT_RUN).partition(":")[0],
            "ratio": size / baseline_size if size is not None and baseline_size else None,
            "verify": (item.get("verify") or {}).get("passed"),
        })  # fmt: skip
    return rows


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Format one row as text, in the order of HEADER.

    Args:
        row: format: str; gqa: accuracy in percent; change: difference from 16 bit and interval: its
            (low, high), in percentage points; p_value; sight: verdict; ratio: bytes relative to
            16 bit; verify: bool. All keys except format may be missing or None, which is shown as
            not run. A row with `baseline` set has no values after gqa.
    """
    first = (str(row["format"]), percent_text(row.get("gqa")))
    if row.get("baseline"):
        return (*first, *[""] * (len(HEADER) - 2))
    change, interval, ratio = (row.get(key) for key in ("change", "interval", "ratio"))
    return (
        *first,
        NOT_RUN if change is None else f"{change:+.2f}",
        NOT_RUN if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}",
        p_value_text(row.get("p_value")),
        str(row.get("sight") or NOT_RUN),
        NOT_RUN if ratio is None else f"{ratio:.2f}x",
        bool_text(row.get("verify"), "passed", "FAILED"),
    )


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the aligned table; changes are in percentage points."""
    lines = [HEADER, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    texts = []
    for line in lines:
        parts = [
            cell.ljust(width) if name in LEFT_ALIGNED else cell.rjust(width)
            for name, cell, width in zip(HEADER, line, widths, strict=True)
        ]
        texts.append("  ".join(parts).rstrip())
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([texts[0], rule, *texts[1:]])


def p_value_text(value: float | None) -> str:
    """Format a p-value, or return "not run"."""
    if value is None:
        return NOT_RUN
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def percent_text(value: float | None, digits: int = 2) -> str:
    """Format a percentage, or return "not run"."""
    return NOT_RUN if value is None else f"{value:.{digits}f} %"


def bool_text(value: bool | None, yes: str, no: str) -> str:
    """Return the text of a boolean result, or "not run"."""
    return NOT_RUN if value is None else yes if value else no


def size_text(size: int) -> str:
    """Format bytes in the decimal unit that leaves one to three digits before the point."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{size} B" if unit == "B" else f"{value:.2f} {unit}"


def _accuracy(item: Mapping[str, Any]) -> float | None:
    return (item.get("accuracy") or {}).get("accuracy")
