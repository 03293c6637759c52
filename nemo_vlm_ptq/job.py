"""What every stage is given, and how a stage's folder is opened and closed by all ranks."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq import store
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.megatron.session import Session
from nemo_vlm_ptq.plan import Plan


@dataclass(frozen=True)
class Written:
    """What a rank wrote into a stage's folder: relative names, and facts for the manifest.

    sha256: of files that were hashed while they were written; the others are read again.
    """

    files: Iterable[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A plan on the ranks that run it.

    stages: that run together; seen: image features, kept between formats; solved: format -> scales
    of layers on this rank, which observe makes while it writes when solve follows.
    """

    plan: Plan
    session: Session
    stages: frozenset[str] = frozenset()
    seen: dict[str, Any] = field(default_factory=dict)
    solved: dict[str, Any] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """The work folder."""
        return Path(self.plan.recipe.workdir)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of weights that are not quantized."""
        return getattr(torch, self.plan.dtype)

    def folder(self, *parts: str) -> Path:
        """A folder of the work folder."""
        return self.work.joinpath(*parts)


def on_first_rank(session: Session, action: Callable[[], Any]) -> Any:
    """Result of an action that only rank 0 takes; its UserError is raised on all ranks."""
    outcome: tuple[Any, str | None] = (None, None)
    if session.rank == 0:
        try:
            outcome = (action(), None)
        except UserError as error:
            outcome = (None, str(error))
    value, message = session.gather(outcome)[0]
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
    job: Job,
    stage: str,
    folder: Path,
    settings: Mapping[str, Any],
    body: Callable[[], Written],
) -> None:
    """Run a stage into its folder unless it is done; the manifest is written last, by rank 0.

    Args:
        job: plan and ranks.
        stage: name, for the log.
        folder: where it writes.
        settings: what it depends on; a finished folder with other settings is refused.
        body: does the work on every rank.
    """
    session = job.session
    if on_first_rank(session, lambda: store.is_done(folder, settings)):
        if session.rank == 0:
            session.log(f"{stage}: {folder} is done")
        return
    on_first_rank(session, lambda: store.begin(folder, settings))
    start = time.monotonic()
    written = body()
    gc.collect()  # a quantized model: modelopt's modules hold methods bound to themselves
    gc.freeze()  # what is left, such as modelopt itself; the session's end undoes it
    session.barrier()
    seconds = time.monotonic() - start
    files: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    own = (store.describe(folder, written.files, written.sha256), dict(written.facts))
    for part_files, part_facts in session.gather(own):
        files.update(part_files)
        facts = _merge(facts, part_facts)
    facts["seconds"] = round(seconds, 2)
    facts["layout"] = str(session.layout)
    on_first_rank(
        session,
        lambda: store.finish(folder, stage=stage, settings=settings, files=files, facts=facts),
    )
    if session.rank == 0:
        session.log(f"{stage}: {folder} written in {seconds:.1f} s")
