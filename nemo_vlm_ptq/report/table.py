"""The table that closes a run: one line per format, everything a decision needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOT_RUN = "not run"
HEADER = (
    "format", "GQA 16 bit", "GQA now", "difference", "sight", "bytes", "ratio", "verify",
)  # fmt: skip


def summarize(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table from a report's facts (see page.write_report); None where not run."""
    baseline = facts.get("baseline") or {}
    return [
        {
            "format": item["name"],
            "gqa_16bit": _accuracy(baseline),
            "gqa": _accuracy(item),
            "sees": item.get("sees"),
            "bytes": item.get("bytes"),
            "bytes_16bit": baseline.get("bytes"),
            "verify": (item.get("verify") or {}).get("passed"),
        }
        for item in facts.get("formats") or ()
    ]


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One row as text, in the order of HEADER.

    Args:
        row: format; gqa_16bit and gqa in percent; sees, verify: bool; bytes and bytes_16bit. All
            but the format may be missing or None: not run.
    """
    before, now = row.get("gqa_16bit"), row.get("gqa")
    size, whole = row.get("bytes"), row.get("bytes_16bit")
    return (
        str(row["format"]),
        percent(before),
        percent(now),
        NOT_RUN if before is None or now is None else f"{now - before:+.2f}",
        choose(row.get("sees"), "sees", "no longer looks"),
        NOT_RUN if size is None else size_text(size),
        f"{size / whole:.2f}x" if size is not None and whole else NOT_RUN,
        choose(row.get("verify"), "passed", "FAILED"),
    )


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """The whole table, aligned, at most 100 columns wide; differences are in points."""
    lines = [HEADER, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    left = {0, HEADER.index("sight"), HEADER.index("verify")}
    texts = []
    for line in lines:
        parts = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        texts.append("  ".join(parts).rstrip())
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([texts[0], rule, *texts[1:]])


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
