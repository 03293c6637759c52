"""Where the error arises: the worst linears, what image and text tokens get, and every linear.

Errors are of a linear's output through its rounded weights, relative, over calibration tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from nemo_vlm_ptq.report import plots
from nemo_vlm_ptq.report.markup import compact, details, element, missing, picture, table

WORST = 3  # linears shown per format
BLOCKS = 2  # tables side by side in which the layers of a format stand

Facts = Mapping[str, Any]


def layer_parts(facts: Facts, folder: Path) -> list[str]:
    """The part of the page about errors by layer, and its plot in the folder."""
    parts = [element("h2", "Error by layer")]
    if plots.plot_layers(facts, folder / "layers.png"):
        about = "Relative output error of every linear, over the layers"
        parts.append(picture("layers.png", about))
    solved = [
        (item["name"], item["layers"])
        for item in facts["formats"]
        if any(entry["error"] is not None for entry in item.get("layers") or ())
    ]
    if not solved:
        return [*parts, missing("Error by layer")]
    parts += _worst(solved)
    parts += _modalities(solved)
    parts.append(element("h3", "Every linear"))
    for name, entries in solved:
        parts.append(details(f"{name}: {len(entries)} linears", _every(entries)))
    return parts


def finite(value: float | None) -> bool:
    """False for an error that is not a number, or infinite."""
    return value is None or math.isfinite(value)


def _worst(solved: Sequence[tuple[str, Sequence[Facts]]]) -> list[str]:
    """The linears that a mixed precision would spare first."""
    rows = []
    for name, entries in solved:
        known = [entry for entry in entries if entry["error"] is not None]
        known.sort(key=lambda e: e["error"] if finite(e["error"]) else math.inf, reverse=True)
        for entry in known[:WORST]:
            alpha = _number(entry.get("alpha"), "{:.2f}")
            rows.append((name, entry["layer"], entry["linear"], f"{entry['error']:.4g}", alpha))
    header = ("format", "layer", "linear", "relative output error", "alpha")
    title = element("h3", f"The {WORST} linears with the largest error")
    return [title, table(header, rows, numbers=(1, 3, 4))]


def _modalities(solved: Sequence[tuple[str, Sequence[Facts]]]) -> list[str]:
    """Errors over text and over image tokens alone, and the weight of images in the search."""
    rows = []
    for name, entries in solved:
        both = [e for e in entries if _known(e, "error_text") and _known(e, "error_image")]
        if both:
            shares = [entry["image_share"] for entry in both if _known(entry, "image_share")]
            middle = [
                f"{median(e[key] for e in both):.4f}" for key in ("error_text", "error_image")
            ]
            rows.append((name, len(both), f"{median(shares):.2f}" if shares else "none", *middle))
    if not rows:
        return []
    header = ("format", "linears", "image share", "error, text tokens", "error, image tokens")
    note = (
        "Medians over the linears. Image share: weight of image tokens against text tokens in the "
        "search for scales; none where nothing is searched."
    )
    return [
        element("h3", "What the modality balance buys"),
        table(header, rows, numbers=range(1, 5)),
        element("p", note, "note"),
    ]


def _every(entries: Iterable[Facts]) -> str:
    """Errors of a format, a row a layer and a column a kind of linear."""
    found = {(entry["layer"], entry["linear"]): entry["error"] for entry in entries}
    kinds = plots.kinds_of(linear for _, linear in found)
    layers = sorted({layer for layer, _ in found})
    height = -(-len(layers) // BLOCKS)
    blocks = []
    for start in range(0, len(layers), height):
        rows = [
            (layer, *(_number(found.get((layer, kind)), "{:.4f}") for kind in kinds))
            for layer in layers[start : start + height]
        ]
        blocks.append(table(("layer", *kinds), rows, numbers=range(len(kinds) + 1)))
    return compact(blocks)


def _known(entry: Facts, key: str) -> bool:
    value = entry.get(key)
    return value is not None and math.isfinite(value)


def _number(value: float | None, form: str) -> str:
    return "none" if value is None else form.format(value)
