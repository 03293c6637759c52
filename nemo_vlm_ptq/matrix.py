"""The support matrix: families and formats as a table or as JSON."""

from __future__ import annotations

import json

from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.formats import FORMATS


def show(what: str, *, as_json: bool) -> str:
    """The families or the formats."""
    rows = _families() if what == "families" else _formats()
    if as_json:
        return json.dumps(rows, indent=1)
    header = list(rows[0])
    table = [header, *([str(row[key]) for key in header] for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
             for line in table]  # fmt: skip
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _families() -> list[dict[str, str]]:
    return [
        {
            "family": family.name,
            "architecture": ", ".join(family.architectures),
            "formats": ", ".join(FORMATS),
            "decoder in TensorRT-LLM": family.trtllm_architecture,
        }
        for family in FAMILIES.values()
    ]


def _formats() -> list[dict[str, str]]:
    return [
        {
            "format": row.name,
            "bits": str(row.bits),
            "targets": ", ".join(row.targets),
            "algorithm": row.algorithm,
            "about": row.about,
        }
        for row in FORMATS.values()
    ]
