"""report: one page from what the stages left behind."""

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
from nemo_vlm_ptq.stages.model_forms import exported_bytes
from nemo_vlm_ptq.workdir import store


def report(job: RunContext) -> None:
    """Write workdir/report/ and print the table and the page's path."""
    if job.parallel.rank == 0:
        facts = collect(job)
        path = page.write_report(job.folder("report"), facts)
        print(table.render(table.summarize(facts)), flush=True)
        print(f"report: {path}", flush=True)
    job.parallel.barrier()


def collect(job: RunContext) -> dict[str, Any]:
    """Everything the page shows, as plain JSON types."""
    plan = job.plan
    observed = store.read_manifest(job.folder("statistics")) or {"settings": {}, "facts": {}}
    baseline = read_result(job.folder(BASELINE, "evaluate"))
    return {
        "title": f"{Path(plan.folder).name}: post-training quantization",
        "model": str(plan.folder),
        "date": datetime.date.today().isoformat(),
        "versions": store.versions(),
        "recipe": plan.recipe.model_dump(mode="json"),
        "layout": str(job.parallel.layout),
        "kv_cache": plan.recipe.quantize.kv_cache,
        "formats": [_format_facts(job, fmt) for fmt in plan.formats],
        "baseline": baseline | {"bytes": total_bytes(plan.tensors)},
        "calibration": observed["facts"] | {"data": observed["settings"].get("data")},
        "timings": _timings(job),
    }


def _format_facts(job: RunContext, fmt: QuantFormat) -> dict[str, Any]:
    targets = job.plan.targets(fmt)
    folder = job.folder(fmt.name)
    solved = store.read_manifest(folder / "scales")
    verified = folder / "verify.json"
    facts: dict[str, Any] = {
        "name": fmt.name,
        "about": fmt.about,
        "targets": targets,
        "layers": solved["facts"]["layers"] if solved else [],
    }
    if (folder / targets[0] / store.MANIFEST).is_file():
        facts["bytes"] = exported_bytes(folder / targets[0])
    if verified.is_file():
        facts["verify"] = store.read_json(verified)
    return facts | read_result(folder / "evaluate")


def _timings(job: RunContext) -> list[dict[str, Any]]:
    """Seconds of every stage that has a folder, in order of the line."""
    folders = ["megatron", "statistics"]
    for fmt in job.plan.formats:
        parts = ("scales", "quantized", *job.plan.targets(fmt))
        folders += [f"{fmt.name}/{part}" for part in parts]
    folders.append(f"{BASELINE}/evaluate")
    folders += [f"{fmt.name}/evaluate" for fmt in job.plan.formats]
    lines = []
    for name in folders:
        manifest = store.read_manifest(job.folder(name))
        if manifest is not None:
            lines.append({"stage": manifest["stage"], "seconds": manifest["facts"]["seconds"]})
    return lines
