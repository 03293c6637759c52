"""A few words of HTML; every text goes through html.escape here and nowhere else."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", "Liberation Sans", sans-serif; color: #1d2329;
  background: #fff; max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .6rem; padding-top: .6rem;
  border-top: 1px solid #dde2e7; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0; }
p { overflow-wrap: anywhere; }
.lead, .note { color: #59636e; }
.note { font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .92rem; }
th, td { padding: .3rem .8rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid #e6eaee; }
th { color: #59636e; font-weight: 600; border-bottom-color: #aab3bc; white-space: nowrap; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td:first-child, td.good, td.bad, td.missing { white-space: nowrap; }
td:last-child { overflow-wrap: break-word; min-width: 5rem; max-width: 40rem; }
.good { color: #00664b; font-weight: 600; }
.bad { color: #a3260b; font-weight: 600; }
.missing { color: #77818b; font-style: italic; }
.alarm { border-left: 4px solid #a3260b; background: #fdf1ee; padding: .5rem .9rem; }
.calm { border-left: 4px solid #00664b; background: #eef7f4; padding: .5rem .9rem; }
.open { border-left: 4px solid #8a949e; background: #f3f5f7; padding: .5rem .9rem; }
.compact { display: flex; flex-wrap: wrap; gap: 0 2.5rem; }
.compact table { font-size: .8rem; }
.compact th, .compact td { padding: .1rem .35rem; min-width: 0; }
summary { cursor: pointer; padding: .15rem 0; }
img { display: block; max-width: 100%; height: auto; margin: .6rem 0; }
code { font: .9em/1.4 ui-monospace, "DejaVu Sans Mono", monospace; }
"""

TONES = {
    "passed": "good", "sees": "good", "failed": "bad", "FAILED": "bad", "missed": "bad",
    "no longer looks": "bad", "blind in 16 bit": "bad", "not run": "missing",
}  # fmt: skip


def element(tag: str, text: Any, kind: str = "") -> str:
    """One element with escaped text."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<{tag}{attribute}>{html.escape(str(text))}</{tag}>"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[int] = ()) -> str:
    """A table; words that are verdicts get their colour, columns in `numbers` stand right."""
    kinds = ["number" if i in numbers else "" for i in range(len(header))]
    head = "".join(element("th", name, kind) for name, kind in zip(header, kinds, strict=True))
    body = []
    for row in rows:
        parts = [
            element("td", cell, f"{kind} {TONES.get(str(cell), '')}".strip())
            for cell, kind in zip(row, kinds, strict=True)
        ]
        body.append(f"<tr>{''.join(parts)}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{chr(10).join(body)}</tbody></table></div>"
    )


def picture(file: str, about: str) -> str:
    """An image that lies beside the page."""
    return f'<img src="{html.escape(file)}" alt="{html.escape(about)}">'


def compact(parts: Iterable[str]) -> str:
    """Tables in small letters, side by side where the page is wide enough."""
    return f'<div class="compact">{"".join(parts)}</div>'


def details(title: str, part: str) -> str:
    """A part that shows when its title is clicked on."""
    return f"<details><summary>{html.escape(title)}</summary>{part}</details>"


def missing(what: str, why: str = "not run") -> str:
    """A line that says what is not there."""
    return element("p", f"{what}: {why}", "missing")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text) in their order."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            rows += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            rows.append((prefix + key, ", ".join(map(str, value)) or "none"))
        else:
            rows.append((prefix + key, "none" if value in (None, {}) else str(value)))
    return rows


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page: no scripts, nothing fetched but the images beside it."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )
