"""Minimal HTML builders without a template engine; all escaping happens in this module."""

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
.error { border-left: 4px solid #a3260b; background: #fdf1ee; padding: .5rem .9rem; }
.success { border-left: 4px solid #00664b; background: #eef7f4; padding: .5rem .9rem; }
.incomplete { border-left: 4px solid #8a949e; background: #f3f5f7; padding: .5rem .9rem; }
.compact { display: flex; flex-wrap: wrap; gap: 0 2.5rem; }
.compact table { font-size: .8rem; }
.compact th, .compact td { padding: .1rem .35rem; min-width: 0; }
summary { cursor: pointer; padding: .15rem 0; }
img { display: block; max-width: 100%; height: auto; margin: .6rem 0; }
code { font: .9em/1.4 ui-monospace, "DejaVu Sans Mono", monospace; }
"""

VERDICT_CLASSES = {
    "passed": "good", "sees": "good", "failed": "bad", "FAILED": "bad", "ignores images": "bad",
    "16 bit ignores images": "bad", "not run": "missing",
}  # fmt: skip


def element(tag: str, text: Any, css_class: str = "") -> str:
    """Return one element with escaped text."""
    attribute = f' class="{css_class}"' if css_class else ""
    return f"<{tag}{attribute}>{html.escape(str(text))}</{tag}>"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[int] = ()) -> str:
    """Return a table; verdicts are coloured, columns in `numbers` are right-aligned."""
    classes = ["number" if i in numbers else "" for i in range(len(header))]
    head = "".join(element("th", name, css) for name, css in zip(header, classes, strict=True))
    body = []
    for row in rows:
        parts = [
            element("td", cell, f"{css} {VERDICT_CLASSES.get(str(cell), '')}".strip())
            for cell, css in zip(row, classes, strict=True)
        ]
        body.append(f"<tr>{''.join(parts)}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{chr(10).join(body)}</tbody></table></div>"
    )


def image(file: str, alt: str) -> str:
    """Return an image element for a file in the page's folder."""
    return f'<img src="{html.escape(file)}" alt="{html.escape(alt)}">'


def compact(parts: Iterable[str]) -> str:
    """Wrap tables in a container with small type, side by side if the page is wide enough."""
    return f'<div class="compact">{"".join(parts)}</div>'


def details(title: str, part: str) -> str:
    """Return a collapsed section that opens on a click on its title."""
    return f"<details><summary>{html.escape(title)}</summary>{part}</details>"


def missing(what: str, reason: str = "not run") -> str:
    """Return a line that names missing content and the reason."""
    return element("p", f"{what}: {reason}", "missing")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested settings into (dotted key, text), in order."""
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
    """Return the complete page, without scripts; only its local images are loaded."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )
