"""How observe is stopped, and what it left behind: finished layers, and some samples in others.

progress.json in the stage's folder says it. It is replaced in one step after the files that it
names are written, so that whatever it says is there.
"""

from __future__ import annotations

import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_vlm_ptq import store

STOPS = (signal.SIGTERM, signal.SIGUSR1)  # a launcher's, and what Slurm is told to send


@dataclass(frozen=True)
class Held:
    """A layer's exact sums so far: the folder of its file, and ids of the samples they contain."""

    folder: str
    ids: frozenset[str]


@dataclass(frozen=True)
class Progress:
    """settings: what the statistics depend on; finished layers; layer -> what others hold; how
    often they were saved."""

    settings: Mapping[str, Any]
    finished: frozenset[int] = frozenset()
    held: Mapping[int, Held] = field(default_factory=dict)
    saves: int = 0

    def ids(self, layer: int) -> frozenset[str]:
        """Samples that a layer contains already."""
        return self.held[layer].ids if layer in self.held else frozenset()

    def with_held(self, layers: Iterable[int], folder: str, ids: frozenset[str]) -> Progress:
        """Some layers now hold more samples, in a new folder."""
        more = {layer: Held(folder, self.ids(layer) | ids) for layer in layers}
        return replace(self, held={**self.held, **more}, saves=self.saves + 1)

    def with_finished(self, layers: Iterable[int]) -> Progress:
        """Some layers are written whole."""
        finished = self.finished | frozenset(layers)
        held = {layer: one for layer, one in self.held.items() if layer not in finished}
        return replace(self, finished=finished, held=held)


def read_progress(folder: Path, settings: Mapping[str, Any]) -> Progress:
    """What was saved in a folder with just these settings; nothing when it has no such record."""
    saved = store.read_progress(folder, settings)
    if saved is None:
        return Progress(settings)
    held = {
        int(layer): Held(one["folder"], frozenset(one["ids"]))
        for layer, one in saved["held"].items()
    }
    return Progress(settings, frozenset(saved["finished"]), held, saved["saves"])


def write_progress(folder: Path, progress: Progress) -> None:
    """Make it what counts from now on, and drop the folders that it does not name."""
    held = {
        layer: {"folder": one.folder, "ids": sorted(one.ids)}
        for layer, one in sorted(progress.held.items())
    }
    record = {"finished": sorted(progress.finished), "held": held, "saves": progress.saves}
    store.write_progress(folder, progress.settings, record)
    named = {one.folder for one in progress.held.values()}
    for place in folder.iterdir():
        if place.is_dir() and place.name not in named:
            shutil.rmtree(place)


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Inside, the signals that would end this rank wait; the function says whether one has come.

    One that came ends the rank where the block ends, as ever.
    """
    came: list[int] = []
    before = {one: signal.signal(one, lambda number, _: came.append(number)) for one in STOPS}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def agreement(asked: Callable[[], bool], group: dist.ProcessGroup, lag: int) -> Callable[[], bool]:
    """What says after each micro-batch whether to stop, alike on all ranks of a model replica.

    Args:
        asked: this rank has been asked to.
        group: ranks of the replica.
        lag: micro-batches between question and answer. The answer travels meanwhile, and pipeline
            stages work on as many at once: none has to wait for it.
    """
    waiting: deque[tuple[torch.Tensor, Any]] = deque()

    def stop() -> bool:
        flag = torch.tensor(int(asked()))
        waiting.append((flag, dist.all_reduce(flag, dist.ReduceOp.MAX, group, async_op=True)))
        if len(waiting) <= lag:
            return False
        flag, travelling = waiting.popleft()
        travelling.wait()
        return bool(flag)

    return stop
