"""HTML report of a run: one self-contained page with its plots in the same folder.

The page is a pure function of plain facts, so that the same facts give the same page.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.report import plots
from nemo_vlm_ptq.report.layers import is_finite, layer_parts
from nemo_vlm_ptq.report.markup import compact, document, element, flatten, image, missing, table
from nemo_vlm_ptq.report.table import HEADER, NOT_RUN, bool_text, cells, percent_text, summarize

SHOWN_SAMPLE_IDS = 4  # per data-parallel rank

Facts = Mapping[str, Any]


def write_report(folder: Path, facts: dict[str, Any]) -> Path:
    """Write index.html and its PNGs and return the path of the page.

    Args:
        folder: the output folder, created if needed; files of an older report are replaced.
        facts: title, model, date, layout: str; versions; recipe: nested;
            formats: [{name, about, targets, bytes, accuracy, swapped: evaluate.gqa.Score as a dict,
            comparison: evaluate.comparison.Comparison as a dict, optionally with
            gate: {limit, passed}, sees, verdict, verify: {passed, checks: [{name, passed, detail}],
            logits: {name: number}}, layers: [{layer, linear, error, alpha, image_share, error_text,
            error_image}]}]; kv_cache: "none" or its number format;
            baseline: {accuracy, swapped, bytes}; calibration: {samples, tokens: {image, text},
            ids_per_rank, data, seconds}; timings: [{stage, seconds}]. Only title and each format's
            name are required: facts that are missing or None are shown as not run.
    """
    facts = {"formats": [], "baseline": {}} | {k: v for k, v in facts.items() if v is not None}
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("accuracy.png", "bytes.png", "layers.png"):
        (folder / name).unlink(missing_ok=True)
    parts = [
        *_head(facts),
        *_summary(facts),
        *_accuracy(facts, folder),
        *_bytes(facts, folder),
        *layer_parts(facts, folder),
        *_verification(facts),
        *_calibration(facts),
        *_settings(facts),
    ]
    page = folder / "index.html"
    page.write_text(document(str(facts["title"]), parts), encoding="utf-8")
    return page


def _head(facts: Facts) -> list[str]:
    known = [facts.get(key) for key in ("model", "layout", "date")]
    return [
        element("h1", facts["title"]),
        element("p", " · ".join(str(item) for item in known if item), "lead"),
    ]


def _summary(facts: Facts) -> list[str]:
    """Build the overall verdict and the summary table, which the CLI prints as well."""
    formats = facts["formats"]
    problems = [problem for item in formats for problem in _problems(item)]
    unknown = [f["name"] for f in formats if not f.get("verify") or f.get("sees") is None]
    if problems:
        verdict = [element("p", problem, "error") for problem in problems]
    elif unknown or not formats:
        names = ", ".join(unknown) or "no format"
        text = f"No problems found, but not all checks were run: {names}."
        verdict = [element("p", text, "incomplete")]
    else:
        text = "All checkpoints passed verification and the sight test."
        verdict = [element("p", text, "success")]
    rows = [cells(row) for row in summarize(facts)]
    details = [(f["name"], f.get("about", ""), ", ".join(f.get("targets") or ())) for f in formats]
    cache = facts.get("kv_cache") or "none"
    kv = [] if cache == "none" else [element("p", f"KV cache: {cache}, in all formats.")]
    note = (
        "GQA: accuracy of the exported checkpoint. Change: difference from 16 bit in percentage "
        "points. p: McNemar's test of no difference. Ratio: checkpoint size relative to 16 bit."
    )
    return [
        *verdict,
        table(HEADER, rows, numbers=range(1, 5)),
        element("p", note, "note"),
        *kv,
        table(("format", "description", "export targets"), details),
    ]


def _problems(item: Facts) -> list[str]:
    """List the reasons not to use a format's checkpoint."""
    found = []
    if (item.get("verify") or {}).get("passed") is False:
        found.append(f"{item['name']}: verification FAILED; do not use this checkpoint.")
    if item.get("sees") is False:
        found.append(f"{item['name']}: {item['verdict']}.")
    broken = sum(not is_finite(entry["error"]) for entry in item.get("layers") or ())
    if broken:
        found.append(f"{item['name']}: the output error of {broken} linears is NaN or infinite.")
    comparison = item.get("comparison") or {}
    if comparison.get("gate") and not comparison["gate"]["passed"]:
        drop, limit = -comparison["difference"], comparison["gate"]["limit"]
        found.append(
            f"{item['name']}: GQA accuracy drops by {drop:.2f} points, the gate allows {limit:g}."
        )
    return found


def _accuracy(facts: Facts, folder: Path) -> list[str]:
    parts = [element("h2", "Accuracy")]
    if not plots.plot_accuracy(facts, folder / "accuracy.png"):
        return [*parts, missing("GQA")]
    alt = "GQA accuracy per format with 95 % intervals, own and swapped images"
    scores = [item.get("accuracy") for item in [facts["baseline"], *facts["formats"]]]
    rules = sorted({score["rule"] for score in scores if score})
    note = f"Scoring rule: {', '.join(rules) or 'none'}. Intervals of single scores: Wilson, 95 %."
    parts += [image("accuracy.png", alt), element("p", note, "note")]
    return [*parts, *_sight_test(facts), *_comparison(facts), *_question_types(facts)]


def _sight_test(facts: Facts) -> list[str]:
    rows = [
        (
            item["name"],
            percent_text((item.get("accuracy") or {}).get("accuracy")),
            percent_text((item.get("swapped") or {}).get("accuracy")),
            item.get("verdict") or NOT_RUN,
        )
        for item in facts["formats"]
    ]
    header = ("format", "own images", "swapped images", "verdict")
    note = (
        "The same questions are answered with the images of other questions swapped in; a model "
        "that uses its images loses accuracy."
    )
    return [
        element("h3", "Sight test: own against swapped images"),
        table(header, rows, numbers=(1, 2)),
        element("p", note, "note"),
    ]


def _comparison(facts: Facts) -> list[str]:
    """Tabulate the paired comparison of each format with 16 bit."""
    parts = [element("h3", "Paired comparison with 16 bit")]
    compared = [item for item in facts["formats"] if item.get("comparison")]
    if not compared:
        return [*parts, missing("Comparison")]
    rows = []
    for item in compared:
        comparison = item["comparison"]
        low, high = comparison["interval"]
        gate = comparison.get("gate")
        rows.append((
            item["name"], f"{comparison['difference']:+.2f}", f"{low:+.2f} to {high:+.2f}",
            comparison["lost"], comparison["gained"], f"{comparison['p_value']:.3g}",
            bool_text(gate["passed"], "passed", "failed") if gate else "none",
        ))  # fmt: skip
    header = ("format", "difference, points", "95 % interval", "lost", "gained", "p", "gate")
    first = compared[0]["comparison"]
    note = (
        "Lost: questions answered correctly in 16 bit only; gained: correctly in the format only. "
        f"Interval: {first.get('interval_method', 'not recorded')}. "
        f"p: {first.get('test', 'McNemar test')}."
    )
    return [*parts, table(header, rows, numbers=range(1, 6)), element("p", note, "note")]


def _question_types(facts: Facts) -> list[str]:
    """Tabulate accuracy by question type, one column per format."""
    columns = [("16 bit", facts["baseline"])]
    columns += [(item["name"], item) for item in facts["formats"]]
    scored = [(name, item["accuracy"]["by_kind"]) for name, item in columns if item.get("accuracy")]
    if not scored:
        return []
    rows = []
    for question_type in sorted({key for _, by_type in scored for key in by_type}):
        counts = [by_type.get(question_type) for _, by_type in scored]
        total = max(count[1] for count in counts if count)
        shares = [percent_text(100 * c[0] / c[1] if c and c[1] else None, 1) for c in counts]
        rows.append((question_type, total, *shares))
    header = ("question type", "questions", *(name for name, _ in scored))
    return [
        element("h3", "Accuracy by question type"),
        compact([table(header, rows, numbers=range(1, len(header)))]),
    ]


def _bytes(facts: Facts, folder: Path) -> list[str]:
    parts = [element("h2", "Checkpoint size")]
    if not plots.plot_bytes(facts, folder / "bytes.png"):
        return [*parts, missing("Export")]
    return [*parts, image("bytes.png", "Checkpoint size of each format and of 16 bit")]


def _verification(facts: Facts) -> list[str]:
    parts = [element("h2", "Verification")]
    for item in facts["formats"]:
        verification = item.get("verify")
        if not verification:
            parts.append(missing(item["name"]))
            continue
        rows = [
            (check["name"], bool_text(check["passed"], "passed", "failed"), check["detail"])
            for check in verification.get("checks") or ()
        ]
        result = bool_text(verification.get("passed"), "passed", "FAILED")
        parts += [
            element("h3", f"{item['name']}: {result}"),
            table(("check", "result", "detail"), rows),
        ]
        if verification.get("logits"):
            logits = [f"{key} {_number(value)}" for key, value in verification["logits"].items()]
            parts.append(element("p", "Logits: " + ", ".join(logits) + ".", "note"))
    return parts


def _calibration(facts: Facts) -> list[str]:
    calibration = facts.get("calibration")
    parts = [element("h2", "Calibration")]
    if not calibration:
        return [*parts, missing("Calibration")]
    tokens, ranks = calibration.get("tokens") or {}, calibration.get("ids_per_rank") or ()
    seconds = calibration.get("seconds")
    rows = [
        ("data", calibration.get("data", "unknown")),
        ("samples", calibration.get("samples", "unknown")),
        *((f"{modality} tokens", f"{count:,}") for modality, count in tokens.items()),
        ("time", "unknown" if seconds is None else f"{seconds:,.1f} s"),
    ]
    parts.append(table(("item", "value"), rows))
    if tokens.get("image") == 0:
        parts.append(element("p", "No image tokens: calibrated on text only.", "bad"))
    if ranks:
        rank_rows = []
        for rank, ids in enumerate(ranks):
            first_ids = ", ".join(map(str, ids[:SHOWN_SAMPLE_IDS]))
            ellipsis = ", ..." if len(ids) > SHOWN_SAMPLE_IDS else ""
            rank_rows.append((rank, len(ids), first_ids + ellipsis))
        all_ids = [sample_id for ids in ranks for sample_id in ids]
        duplicates = len(all_ids) - len(set(all_ids))
        counts = f"{len(all_ids)} sample ids on {len(ranks)} data-parallel ranks"
        line = f"{counts}, {duplicates} duplicated."
        parts.append(element("p", line, "bad" if duplicates else ""))
        header = ("data-parallel rank", "samples", "first ids")
        parts.append(table(header, rank_rows, numbers=(0, 1)))
    return parts


def _settings(facts: Facts) -> list[str]:
    """Tabulate timings, recipe and versions: what is needed to reproduce the run."""
    parts = [element("h2", "Time")]
    timings = [(entry["stage"], f"{entry['seconds']:,.1f}") for entry in facts.get("timings") or ()]
    parts.append(table(("stage", "seconds"), timings, (1,)) if timings else missing("Time"))
    for title, key in (("Recipe", "recipe"), ("Versions", "versions")):
        rows = flatten(facts.get(key) or {})
        parts.append(element("h2", title))
        parts.append(table((key, "value"), rows) if rows else missing(title, "not recorded"))
    return parts


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
