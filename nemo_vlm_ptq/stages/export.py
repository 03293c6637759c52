"""export: write the requested targets from the source's weights and the solved scales.

Targets under Hugging Face names are written together. Where observe takes several windows and
export follows in the same run, their files are started as soon as their layers are solved.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from nemo_vlm_ptq.context import (
    RunContext,
    StageFolder,
    StageOutput,
    on_rank_zero,
    run_stage,
    run_together,
)
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.stages.settings import settings_hash, solve_settings, source_identity
from nemo_vlm_ptq.targets.registry import TARGETS, load_module
from nemo_vlm_ptq.targets.writing.published import PublishedExport, PublishedFiles
from nemo_vlm_ptq.workdir import store

FILE_THREADS = 4  # files that a rank writes at once; one while it observes


def export(context: RunContext) -> None:
    """Write every requested target of every format."""
    for fmt in context.plan.formats:
        store.require_manifest(context.folder(fmt.name, "scales"), "solve")
    published = _published_exports(context)

    def write(stages: Sequence[StageFolder]) -> list[StageOutput]:
        exports = [published[stage] for stage in stages]
        if context.started_exports:
            started: PublishedFiles = context.started_exports.pop()
            if [one.folder for one in started.exports] == [one.folder for one in exports]:
                return started.finish()
            started.finish()
        return PublishedFiles(context, exports, FILE_THREADS).finish()

    run_together(context, list(published), write)
    for stage, fmt, target in _stages(context):
        writer = load_module(target, "writer")
        if not hasattr(writer, "PUBLISHED"):
            body = partial(writer.write, context, fmt, stage.folder)
            run_stage(context, stage.stage, stage.folder, stage.settings, body)


def start_exports(context: RunContext) -> PublishedFiles | None:
    """Create the folders of exports that can be written while layers are solved (collective).

    Returns:
        Their files, which the stage finishes; None if there are none.
    """
    published = _published_exports(context)

    def begin() -> list[bool]:
        finished = [store.is_finished(one.folder, one.settings) for one in published]
        for stage, is_finished in zip(published, finished, strict=True):
            if not is_finished:
                store.begin_stage(stage.folder, stage.settings)
                store.write_progress(stage.folder, stage.settings, {})  # the stage keeps the files
        return finished

    finished = on_rank_zero(context.parallel, begin)
    pairs = zip(published.values(), finished, strict=True)
    exports = [one for one, is_finished in pairs if not is_finished]
    if not exports:
        return None
    files = PublishedFiles(context, exports, 1)
    context.started_exports.append(files)
    return files


def _published_exports(context: RunContext) -> dict[StageFolder, PublishedExport]:
    """Return the exports under Hugging Face names."""
    found = {}
    for stage, fmt, target in _stages(context):
        writer = load_module(target, "writer")
        if hasattr(writer, "PUBLISHED"):
            found[stage] = PublishedExport(fmt=fmt, folder=stage.folder, published=writer.PUBLISHED)
    return found


def _stages(context: RunContext) -> list[tuple[StageFolder, QuantFormat, str]]:
    """Return the folders of all exports with format and target."""
    source = source_identity(context.plan)
    return [
        (_stage(context, fmt, target, source), fmt, target)
        for fmt in context.plan.formats
        for target in context.plan.targets(fmt)
    ]


def _stage(context: RunContext, fmt: QuantFormat, target: str, source: str) -> StageFolder:
    """Return the folder of an export, and what it depends on."""
    plan, solved = context.plan, store.read_manifest(context.folder(fmt.name, "scales"))
    scales = solve_settings(plan, context.workdir, fmt) if solved is None else solved["settings"]
    settings: dict[str, Any] = {
        "format": fmt.name,
        "source": source,
        "scales": settings_hash(scales),
        "dtype": plan.dtype,
        "kv_cache": plan.recipe.quantize.kv_cache,
    }
    settings |= {key: getattr(plan.recipe.export, key) for key in TARGETS[target].layout_keys}
    folder = plan.export_folder(fmt, target)
    return StageFolder(f"export {fmt.name} {target}", folder, settings)
