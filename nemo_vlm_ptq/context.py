"""What every stage receives, and how all ranks begin and finish a stage folder."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.megatron.parallel_context import ParallelContext
from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.workdir import store


@dataclass(frozen=True)
class StageOutput:
    """What one rank wrote into a stage folder.

    files: names below the folder.
    facts: entries of the manifest; those of all ranks are merged.
    sha256: of files that were hashed while they were written; the others are read again.
    """

    files: Iterable[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class StageFolder:
    """A folder that a stage writes: name of the stage, folder, what the output depends on."""

    stage: str
    folder: Path
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """A plan on the ranks that run it.

    stages: stages of this run.
    started_exports: files of exports that observe has started, for the stage export.
    encoded_images: image id -> encoded image, shared by the evaluation of all formats.
    """

    plan: Plan
    parallel: ParallelContext
    stages: frozenset[str] = frozenset()
    started_exports: list[Any] = field(default_factory=list)
    encoded_images: dict[str, Any] = field(default_factory=dict)

    @property
    def workdir(self) -> Path:
        """The work folder."""
        return Path(self.plan.recipe.workdir)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of weights that are not quantized."""
        return getattr(torch, self.plan.dtype)

    def folder(self, *parts: str) -> Path:
        """Return a path below the work folder."""
        return self.workdir.joinpath(*parts)


def on_rank_zero(parallel: ParallelContext, action: Callable[[], Any]) -> Any:
    """Run an action on rank 0; return its result, or raise its UserError, on all ranks."""
    outcome: tuple[Any, str | None] = (None, None)
    if parallel.rank == 0:
        try:
            outcome = (action(), None)
        except UserError as error:
            outcome = (None, str(error))
    value, message = parallel.all_gather(outcome)[0]
    if message is not None:
        raise UserError(message)
    return value


def run_stage(
    context: RunContext,
    stage: str,
    folder: Path,
    settings: Mapping[str, Any],
    body: Callable[[], StageOutput],
) -> None:
    """Run a stage into its folder unless it is finished; rank 0 writes the manifest last.

    Args:
        context: plan and ranks.
        stage: name, for the log.
        folder: the stage folder.
        settings: what the output depends on; a finished folder with other settings is rejected.
        body: does the work on every rank.
    """
    run_together(context, [StageFolder(stage, folder, settings)], lambda _: [body()])


def run_together(
    context: RunContext,
    stages: Sequence[StageFolder],
    body: Callable[[Sequence[StageFolder]], Sequence[StageOutput]],
) -> None:
    """Run stages into folders that are written at the same time; finished ones are left out.

    Args:
        context: plan and ranks.
        stages: the folders.
        body: does the work on every rank, for the folders that are not finished.
    """
    parallel = context.parallel

    def find_finished() -> list[bool]:
        return [store.is_finished(one.folder, one.settings) for one in stages]

    finished = on_rank_zero(parallel, find_finished)
    remaining = [one for one, is_done in zip(stages, finished, strict=True) if not is_done]
    if parallel.rank == 0:
        for one in stages:
            if one not in remaining:
                parallel.log(f"{one.stage}: {one.folder} is done")
    if not remaining:
        return

    def begin() -> None:
        for one in remaining:
            store.begin_stage(one.folder, one.settings)

    on_rank_zero(parallel, begin)
    start = time.monotonic()
    outputs = body(remaining)
    gc.collect()  # a quantized model: modelopt's modules hold methods bound to themselves
    gc.freeze()  # the remaining objects, modelopt's above all; unfrozen when the ranks end
    if parallel.device.type == "cuda":
        torch.cuda.empty_cache()  # memory of the streams that the stage has used
    parallel.barrier()
    _finish(context, remaining, outputs, time.monotonic() - start)


def _finish(
    context: RunContext,
    stages: Sequence[StageFolder],
    outputs: Sequence[StageOutput],
    seconds: float,
) -> None:
    """Hash the files of all folders and write their manifests; the folders share the seconds."""
    parallel = context.parallel

    def hash_output(pair: tuple[StageFolder, StageOutput]) -> dict[str, dict[str, Any]]:
        stage, output = pair
        return store.hash_files(stage.folder, output.files, output.sha256)

    with ThreadPoolExecutor(len(stages)) as threads:
        hashed = list(threads.map(hash_output, zip(stages, outputs, strict=True)))
    own = [(files, dict(output.facts)) for files, output in zip(hashed, outputs, strict=True)]
    gathered = parallel.all_gather(own)
    for index, one in enumerate(stages):
        files: dict[str, Any] = {}
        facts: dict[str, Any] = {}
        for rank_files, rank_facts in (part[index] for part in gathered):
            files.update(rank_files)
            facts = _merge_facts(facts, rank_facts)
        facts |= {"seconds": round(seconds / len(stages), 2), "layout": str(parallel.layout)}
        finish = partial(store.finish_stage, one.folder, stage=one.stage, settings=one.settings)
        on_rank_zero(parallel, partial(finish, files=files, facts=facts))
        if parallel.rank == 0:
            together = f", {len(stages)} together" if stages[1:] else ""
            parallel.log(f"{one.stage}: {one.folder} written in {seconds:.1f} s{together}")


def _merge_facts(facts: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the facts of two ranks: lists are concatenated, counts in a mapping are added."""
    for key, value in more.items():
        before = facts.get(key)
        if isinstance(before, list):
            facts[key] = before + value
        elif isinstance(before, dict):
            facts[key] = {name: before[name] + value[name] for name in before}
        else:
            facts[key] = value
    return facts
