"""What every stage receives, and how all ranks begin and finish a stage folder."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """A plan on the ranks that run it.

    stages: stages of this run.
    encoded_images: image id -> encoded image, shared by the evaluation of all formats.
    solved_scales: format -> scales of this rank's layers, solved by observe when solve follows.
    """

    plan: Plan
    parallel: ParallelContext
    stages: frozenset[str] = frozenset()
    encoded_images: dict[str, Any] = field(default_factory=dict)
    solved_scales: dict[str, Any] = field(default_factory=dict)

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
    parallel = context.parallel
    if on_rank_zero(parallel, lambda: store.is_finished(folder, settings)):
        if parallel.rank == 0:
            parallel.log(f"{stage}: {folder} is done")
        return
    on_rank_zero(parallel, lambda: store.begin_stage(folder, settings))
    start = time.monotonic()
    output = body()
    gc.collect()  # a quantized model: modelopt's modules hold methods bound to themselves
    gc.freeze()  # the remaining objects, modelopt's above all; unfrozen when the ranks end
    parallel.barrier()
    seconds = time.monotonic() - start
    files: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    hashed = store.hash_files(folder, output.files, output.sha256)
    for rank_files, rank_facts in parallel.all_gather((hashed, dict(output.facts))):
        files.update(rank_files)
        facts = _merge_facts(facts, rank_facts)
    facts |= {"seconds": round(seconds, 2), "layout": str(parallel.layout)}
    on_rank_zero(
        parallel,
        lambda: store.finish_stage(
            folder, stage=stage, settings=settings, files=files, facts=facts
        ),
    )
    if parallel.rank == 0:
        parallel.log(f"{stage}: {folder} written in {seconds:.1f} s")


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
