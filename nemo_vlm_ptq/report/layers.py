"""Quantization error by layer: the worst linears, error by modality, and all linears.

An error is the relative output error of a linear with quantized weights over the calibration
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from nemo_vlm_ptq.report import plots
from nemo_vlm_ptq.report.markup import compact, details, element, image, missing, table

WORST_LINEARS = 3  # linears listed per format
LAYER_COLUMNS = 2  # tables placed side by side for the layers of a format

Facts = Mapping[str, Any]


def layer_parts(facts: Facts, folder: Path) -> list[str]:
    """Build the page's section on errors by layer and write its plot into the folder."""
    parts = [element("h2", "Error by layer")]
    if plots.plot_layers(facts, folder / "layers.png"):
        alt = "Relative output error of every linear, over the layers"
        parts.append(image("layers.png", alt))
    solved = [
        (item["name"], item["layers"])
        for item in facts["formats"]
        if any(entry["error"] is not None for entry in item.get("layers") or ())
    ]
    if not solved:
        return [*parts, missing("Error by layer")]
    parts += _worst_linears(solved)
    parts += _modalities(solved)
    parts.append(element("h3", "All linears"))
    for name, entries in solved:
        parts.append(details(f"{name}: {len(entries)} linears", _all_linears(entries)))
    return parts


def is_finite(error: float | None) -> bool:
    """Return False for NaN and infinite errors; True for None, which was not computed."""
    return error is None or math.isfinite(error)


def _worst_linears(solved: Sequence[tuple[str, Sequence[Facts]]]) -> list[str]:
    """List the linears with the largest error, the first candidates for higher precision."""
    rows = []
    for name, entries in solved:
        known = [entry for entry in entries if entry["error"] is not None]
        known.sort(key=lambda e: e["error"] if is_finite(e["error"]) else math.inf, reverse=True)
        for entry in known[:WORST_LINEARS]:
            alpha = _number_text(entry.get("alpha"), "{:.2f}")
            rows.append((name, entry["layer"], entry["linear"], f"{entry['error']:.4g}", alpha))
    header = ("format", "layer", "linear", "relative output error", "alpha")
    title = element("h3", f"The {WORST_LINEARS} linears with the largest error")
    return [title, table(header, rows, numbers=(1, 3, 4))]


def _modalities(solved: Sequence[tuple[str, Sequence[Facts]]]) -> list[str]:
    """Compare errors over text tokens and over image tokens, with the image share used."""
    rows = []
    for name, entries in solved:
        both = [
            e for e in entries if _has_number(e, "error_text") and _has_number(e, "error_image")
        ]
        if both:
            shares = [entry["image_share"] for entry in both if _has_number(entry, "image_share")]
            medians = [
                f"{median(e[key] for e in both):.4f}" for key in ("error_text", "error_image")
            ]
            rows.append((name, len(both), f"{median(shares):.2f}" if shares else "none", *medians))
    if not rows:
        return []
    header = ("format", "linears", "image share", "error, text tokens", "error, image tokens")
    note = (
        "Medians over the linears. Image share: weight of image tokens relative to text tokens in "
        "the scale search; none if the format has no search."
    )
    return [
        element("h3", "Error by modality"),
        table(header, rows, numbers=range(1, 5)),
        element("p", note, "note"),
    ]


def _all_linears(entries: Iterable[Facts]) -> str:
    """Tabulate the errors of a format: one row per layer, one column per linear name."""
    errors = {(entry["layer"], entry["linear"]): entry["error"] for entry in entries}
    linears = plots.ordered_linears(linear for _, linear in errors)
    layers = sorted({layer for layer, _ in errors})
    height = -(-len(layers) // LAYER_COLUMNS)
    blocks = []
    for start in range(0, len(layers), height):
        rows = [
            (layer, *(_number_text(errors.get((layer, name)), "{:.4f}") for name in linears))
            for layer in layers[start : start + height]
        ]
        blocks.append(table(("layer", *linears), rows, numbers=range(len(linears) + 1)))
    return compact(blocks)


def _has_number(entry: Facts, key: str) -> bool:
    value = entry.get(key)
    return value is not None and math.isfinite(value)


def _number_text(value: float | None, spec: str) -> str:
    return "none" if value is None else spec.format(value)
