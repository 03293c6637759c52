"""The report of a whole job: one page a person can read, keep and mail, with its plots beside it.

It draws on plain facts only and looks nothing up, so the same facts give the same page.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.report import plots
from nemo_vlm_ptq.report.layers import finite, layer_parts
from nemo_vlm_ptq.report.markup import compact, document, element, flatten, missing, picture, table
from nemo_vlm_ptq.report.table import HEADER, NOT_RUN, cells, choose, percent, summarize

FIRST_IDS = 4  # sample ids shown per rank

Facts = Mapping[str, Any]


def write_report(folder: Path, facts: dict[str, Any]) -> Path:
    """Write index.html and its PNGs into an existing or new folder; returns the page's path.

    Args:
        folder: where to write; files of an older report are replaced.
        facts: title, model, date, layout: str; versions; recipe: nested;
            formats: [{name, about, targets, bytes, accuracy, swapped: evaluate.gqa.Score as a dict,
            comparison: evaluate.compare.Comparison as a dict, which may also hold
            gate: {limit, passed}, sees, verdict, verify: {passed, checks: [{name, passed, detail}],
            logits: {name: number}}, layers: [{layer, linear, error, alpha, image_share, error_text,
            error_image}]}]; kv_cache: "none" or its numbers;
            baseline: {accuracy, swapped, bytes}; calibration: {samples, tokens: {image, text},
            ids_per_rank, data, seconds}; timings: [{stage, seconds}]. Only title and each format's
            name are needed: what is missing or None is shown as not run.
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
    """The verdict, and the same table that the command prints."""
    formats = facts["formats"]
    problems = [problem for item in formats for problem in _problems(item)]
    unknown = [f["name"] for f in formats if not f.get("verify") or f.get("sees") is None]
    if problems:
        verdict = [element("p", problem, "alarm") for problem in problems]
    elif unknown or not formats:
        names = ", ".join(unknown) or "no format"
        verdict = [element("p", f"No problem was found, but not all was run: {names}.", "open")]
    else:
        verdict = [element("p", "Every checkpoint passed verification and still sees.", "calm")]
    rows = [cells(row) for row in summarize(facts)]
    about = [(f["name"], f.get("about", ""), ", ".join(f.get("targets") or ())) for f in formats]
    cache = facts.get("kv_cache") or "none"
    kv = [] if cache == "none" else [element("p", f"KV cache: {cache}, in every format.")]
    note = (
        "GQA is read back from the exported checkpoint; change is in points against 16 bit, p is "
        "McNemar's, of no change at all; ratio is of the bytes of the whole checkpoint."
    )
    return [
        *verdict,
        table(HEADER, rows, numbers=range(1, 5)),
        element("p", note, "note"),
        *kv,
        table(("format", "what it is", "written for"), about),
    ]


def _problems(item: Facts) -> list[str]:
    """What a reader must know before using a format's checkpoint."""
    found = []
    if (item.get("verify") or {}).get("passed") is False:
        found.append(f"{item['name']}: verification FAILED; do not use this checkpoint.")
    if item.get("sees") is False:
        found.append(f"{item['name']}: {item['verdict']}.")
    broken = sum(not finite(entry["error"]) for entry in item.get("layers") or ())
    if broken:
        found.append(f"{item['name']}: the output error of {broken} linears is not a number.")
    pair = item.get("comparison") or {}
    if pair.get("gate") and not pair["gate"]["passed"]:
        lost, limit = -pair["difference"], pair["gate"]["limit"]
        found.append(f"{item['name']}: loses {lost:.2f} points, its gate allows {limit:g}.")
    return found


def _accuracy(facts: Facts, folder: Path) -> list[str]:
    parts = [element("h2", "Accuracy")]
    if not plots.plot_accuracy(facts, folder / "accuracy.png"):
        return [*parts, missing("GQA")]
    about = "GQA accuracy per format with 95 % intervals, own and swapped images"
    scores = [item.get("accuracy") for item in [facts["baseline"], *facts["formats"]]]
    rules = sorted({score["rule"] for score in scores if score})
    note = f"Counting rule: {', '.join(rules) or 'none'}. Intervals of single scores: Wilson, 95 %."
    parts += [picture("accuracy.png", about), element("p", note, "note")]
    return [*parts, *_sight(facts), *_comparison(facts), *_kinds(facts)]


def _sight(facts: Facts) -> list[str]:
    rows = [
        (
            item["name"],
            percent((item.get("accuracy") or {}).get("accuracy")),
            percent((item.get("swapped") or {}).get("accuracy")),
            item.get("verdict") or NOT_RUN,
        )
        for item in facts["formats"]
    ]
    header = ("format", "own image", "swapped image", "verdict")
    return [element("h3", "Does it still look?"), table(header, rows, numbers=(1, 2))]


def _comparison(facts: Facts) -> list[str]:
    """Each format against 16 bit, on the same questions."""
    parts = [element("h3", "Against 16 bit, question by question")]
    found = [item for item in facts["formats"] if item.get("comparison")]
    if not found:
        return [*parts, missing("Comparison")]
    rows = []
    for item in found:
        pair = item["comparison"]
        low, high = pair["interval"]
        gate = pair.get("gate")
        rows.append((
            item["name"], f"{pair['difference']:+.2f}", f"{low:+.2f} to {high:+.2f}",
            pair["lost"], pair["gained"], f"{pair['p_value']:.3g}",
            choose(gate and gate["passed"], "passed", "missed") if gate else "none",
        ))  # fmt: skip
    header = ("format", "difference, points", "95 % interval", "lost", "gained", "p", "gate")
    first = found[0]["comparison"]
    note = f"{first.get('interval_method', '')}; p: {first.get('test', 'McNemar')}."
    return [*parts, table(header, rows, numbers=range(1, 6)), element("p", note, "note")]


def _kinds(facts: Facts) -> list[str]:
    """Accuracy by kind of question, formats side by side."""
    columns = [("16 bit", facts["baseline"])]
    columns += [(item["name"], item) for item in facts["formats"]]
    found = [(name, item["accuracy"]["by_kind"]) for name, item in columns if item.get("accuracy")]
    if not found:
        return []
    rows = []
    for kind in sorted({kind for _, by_kind in found for kind in by_kind}):
        pairs = [by_kind.get(kind) for _, by_kind in found]
        total = max(pair[1] for pair in pairs if pair)
        shares = [percent(100 * p[0] / p[1] if p and p[1] else None, 1) for p in pairs]
        rows.append((kind, total, *shares))
    header = ("kind", "questions", *(name for name, _ in found))
    return [
        element("h3", "By kind of question"),
        compact([table(header, rows, numbers=range(1, len(header)))]),
    ]


def _bytes(facts: Facts, folder: Path) -> list[str]:
    parts = [element("h2", "Size on disk")]
    if not plots.plot_bytes(facts, folder / "bytes.png"):
        return [*parts, missing("Export")]
    return [*parts, picture("bytes.png", "Checkpoint bytes of each format beside 16 bit")]


def _verification(facts: Facts) -> list[str]:
    parts = [element("h2", "Verification")]
    for item in facts["formats"]:
        proof = item.get("verify")
        if not proof:
            parts.append(missing(item["name"]))
            continue
        checks = proof.get("checks") or ()
        rows = [(c["name"], choose(c["passed"], "passed", "failed"), c["detail"]) for c in checks]
        parts += [
            element("h3", f"{item['name']}: {choose(proof.get('passed'), 'passed', 'FAILED')}"),
            table(("check", "result", "detail"), rows),
        ]
        if proof.get("logits"):
            logits = [f"{key} {_number(value)}" for key, value in proof["logits"].items()]
            parts.append(element("p", "Logits: " + ", ".join(logits) + ".", "note"))
    return parts


def _calibration(facts: Facts) -> list[str]:
    found = facts.get("calibration")
    parts = [element("h2", "Calibration")]
    if not found:
        return [*parts, missing("Calibration")]
    tokens, ranks = found.get("tokens") or {}, found.get("ids_per_rank") or ()
    seconds = found.get("seconds")
    rows = [
        ("data", found.get("data", "unknown")),
        ("samples", found.get("samples", "unknown")),
        *((f"{kind} tokens", f"{count:,}") for kind, count in tokens.items()),
        ("time", "unknown" if seconds is None else f"{seconds:,.1f} s"),
    ]
    parts.append(table(("what", "value"), rows))
    if tokens.get("image") == 0:
        parts.append(element("p", "No image tokens: calibrated on text only.", "bad"))
    if ranks:
        shares = []
        for rank, ids in enumerate(ranks):
            first = ", ".join(map(str, ids[:FIRST_IDS]))
            shares.append((rank, len(ids), first + (", ..." if len(ids) > FIRST_IDS else "")))
        named = [name for ids in ranks for name in ids]
        twice = len(named) - len(set(named))
        line = f"{len(named)} sample ids over {len(ranks)} data-parallel ranks, {twice} seen twice."
        parts.append(element("p", line, "bad" if twice else ""))
        parts.append(table(("data rank", "samples", "first ids"), shares, numbers=(0, 1)))
    return parts


def _settings(facts: Facts) -> list[str]:
    """Everything that is needed to do it again."""
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
