"""report: write one HTML page from the manifests and results of all stages."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.checkpoints.huggingface import total_bytes
from nemo_vlm_ptq.constants import BASELINE
from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.report import page, table
from nemo_vlm_ptq.stages.evaluate import read_result
from nemo_vlm_ptq.targets.registry import TARGETS
from nemo_vlm_ptq.workdir import store

WEIGHT_SUFFIXES = (".safetensors", ".distcp")


def report(context: RunContext) -> None:
    """Write workdir/report/ and print the table and the page's path."""
    if context.parallel.rank == 0:
        facts = collect(context)
        path = page.write_report(context.folder("report"), facts)
        print(table.render(table.summarize(facts)), flush=True)
        print(f"report: {path}", flush=True)
    context.parallel.barrier()


def collect(context: RunContext) -> dict[str, Any]:
    """Return everything that the page shows, as plain JSON types."""
    plan = context.plan
    observed = store.read_manifest(context.folder("statistics")) or {"settings": {}, "facts": {}}
    baseline = read_result(context.folder(BASELINE, "evaluate"))
    return {
        "title": f"{Path(plan.folder).name}: post-training quantization",
        "model": str(plan.folder),
        "date": datetime.date.today().isoformat(),
        "versions": store.package_versions(),
        "recipe": plan.recipe.model_dump(mode="json"),
        "layout": str(context.parallel.layout),
        "kv_cache": plan.recipe.quantize.kv_cache,
        "formats": [_format_facts(context, fmt) for fmt in plan.formats],
        "baseline": baseline | {"bytes": total_bytes(plan.tensors)},
        "calibration": observed["facts"] | {"data": observed["settings"].get("data")},
        "timings": _timings(context),
    }


def _format_facts(context: RunContext, fmt: QuantFormat) -> dict[str, Any]:
    targets = context.plan.targets(fmt)
    folder = context.folder(fmt.name)
    solved = store.read_manifest(folder / "scales")
    verified = folder / "verify.json"
    facts: dict[str, Any] = {
        "name": fmt.name,
        "about": fmt.about,
        "targets": targets,
        "layers": solved["facts"]["layers"] if solved else [],
    }
    first = context.plan.export_folder(fmt, targets[0])
    if (first / store.MANIFEST).is_file():
        weights = (path for path in first.rglob("*") if path.suffix in WEIGHT_SUFFIXES)
        facts["bytes"] = sum(path.stat().st_size for path in weights)
    if verified.is_file():
        facts["verify"] = store.read_json(verified)
    return facts | read_result(folder / "evaluate")


def _timings(context: RunContext) -> list[dict[str, Any]]:
    """Return the seconds of every finished stage, in the order of the stages."""
    folders = ["megatron", "statistics"]
    for fmt in context.plan.formats:
        exports = [TARGETS[target].folder for target in context.plan.targets(fmt)]
        folders += [f"{fmt.name}/{part}" for part in ("scales", *exports)]
    folders.append(f"{BASELINE}/evaluate")
    folders += [f"{fmt.name}/evaluate" for fmt in context.plan.formats]
    timings = []
    for name in folders:
        manifest = store.read_manifest(context.folder(name))
        if manifest is not None:
            timings.append({"stage": manifest["stage"], "seconds": manifest["facts"]["seconds"]})
    return timings
