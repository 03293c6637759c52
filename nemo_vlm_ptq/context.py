"""What every stage is given, and how a stage's folder is opened and closed by all ranks."""

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
    """What a rank wrote into a stage's folder: relative names, and facts for the manifest.

    sha256: of files that were hashed while they were written; the others are read again.
    """

    files: Iterable[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunContext:
    """A plan on the ranks that run it.

    stages: that run together; seen: image features, kept between formats; solved: format -> scales
    of layers on this rank, which observe makes while it writes when solve follows.
    """

    plan: Plan
    parallel: ParallelContext
    stages: frozenset[str] = frozenset()
    image_features: dict[str, Any] = field(default_factory=dict)
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
        """A folder of the work folder."""
        return self.workdir.joinpath(*parts)


def on_rank_zero(parallel: ParallelContext, action: Callable[[], Any]) -> Any:
    """Result of an action that only rank 0 takes; its UserError is raised on all ranks."""
    outcome: tuple[Any, str | None] = (None, None)
    if parallel.rank == 0:
        try:
            outcome = (action(), None)
        except UserError as error:
            outcome = (None, str(error))
    value, message = parallel.gather(outcome)[0]
    if message is not None:
        raise UserError(message)
    return value


def _merge(facts: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of two ranks together: lists are joined, counts in a mapping are added."""
    for key, value in more.items():
        before = facts.get(key)
        if isinstance(before, list):
            facts[key] = before + value
        elif isinstance(before, dict):
            facts[key] = {name: before[name] + value[name] for name in before}
        else:
            facts[key] = value
    return facts


def run_stage(
    job: RunContext,
    stage: str,
    folder: Path,
    settings: Mapping[str, Any],
    body: Callable[[], StageOutput],
) -> None:
    """Run a stage into its folder unless it is done; the manifest is written last, by rank 0.

    Args:
        job: plan and ranks.
        stage: name, for the log.
        folder: where it writes.
        settings: what it depends on; a finished folder with other settings is refused.
        body: does the work on every rank.
    """
    parallel = job.parallel
    if on_rank_zero(parallel, lambda: store.is_done(folder, settings)):
        if parallel.rank == 0:
            parallel.log(f"{stage}: {folder} is done")
        return
    on_rank_zero(parallel, lambda: store.begin_stage(folder, settings))
    start = time.monotonic()
    written = body()
    gc.collect()  # a quantized model: modelopt's modules hold methods bound to themselves
    gc.freeze()  # what is left, such as modelopt itself; the session's end undoes it
    parallel.barrier()
    seconds = time.monotonic() - start
    files: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    own = (store.hash_files(folder, written.files, written.sha256), dict(written.facts))
    for part_files, part_facts in parallel.gather(own):
        files.update(part_files)
        facts = _merge(facts, part_facts)
    facts["seconds"] = round(seconds, 2)
    facts["layout"] = str(parallel.layout)
    on_rank_zero(
        parallel,
        lambda: store.finish_stage(
            folder, stage=stage, settings=settings, files=files, facts=facts
        ),
    )
    if parallel.rank == 0:
        parallel.log(f"{stage}: {folder} written in {seconds:.1f} s")
