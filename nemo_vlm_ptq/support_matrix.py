"""The support matrix: families and formats as a table of at most 100 columns, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.targets.registry import TARGETS, supported_kv_caches, supported_targets


def show_matrix(what: str, *, as_json: bool) -> str:
    """Return the families or the formats."""
    if as_json:
        return json.dumps(_families() if what == "families" else _formats(), indent=1)
    return _families_table() if what == "families" else _formats_table()


def _families() -> list[dict[str, Any]]:
    return [
        {
            "family": family.name,
            "architectures": list(family.architectures),
            "formats": list(FORMATS),
            "trtllm_architecture": family.trtllm_architecture,
        }
        for family in FAMILIES.values()
    ]


def _formats() -> list[dict[str, Any]]:
    rows = []
    for fmt in FORMATS.values():
        targets = {
            target: {
                "servers": list(TARGETS[target].servers.get(fmt.name, ())),
                "kv_caches": supported_kv_caches(fmt, target),
                "legacy": TARGETS[target].legacy,
            }
            for target in supported_targets(fmt)
        }
        row = {"format": fmt.name, "bits": fmt.bits, "algorithm": fmt.algorithm}
        rows.append(row | {"about": fmt.about, "targets": targets})
    return rows


def _families_table() -> str:
    header = ("family", "architecture", "decoder in TensorRT-LLM")
    rows = []
    for family in FAMILIES.values():
        first, *others = family.architectures
        rows.append((family.name, first, family.trtllm_architecture))
        rows += [("", architecture, "") for architecture in others]
    return f"{_table(header, rows)}\n\nEvery family supports every format."


def _formats_table() -> str:
    """Return the formats, then formats by targets, then a line per target."""
    formats = [(row.name, f"{row.bits:g}", row.algorithm, row.about) for row in FORMATS.values()]
    targets = [
        (row.name, *("yes" if name in supported_targets(row) else "-" for name in TARGETS))
        for row in FORMATS.values()
    ]
    parts = [
        _table(("format", "bits", "algorithm", "about"), formats),
        _table(("format", *TARGETS), targets),
        "\n".join(_target_lines()),
    ]
    return "\n\n".join(parts)


def _target_lines() -> list[str]:
    lines = []
    for name, spec in TARGETS.items():
        servers = sorted({server for names in spec.servers.values() for server in names})
        caches = ", ".join(spec.kv_caches) or "none"
        lines.append(f"{name}: read by {', '.join(servers)}; KV caches: {caches}")
        if spec.legacy:
            lines.append(f"    legacy: {spec.legacy}")
    return [*lines, "--json lists the servers and KV caches of each format."]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [header, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
