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

from nemo_vlm_ptq.workdir import store

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # a launcher's, and what Slurm is told to send


@dataclass(frozen=True)
class SavedSums:
    """A layer's exact sums so far: the folder of its file, and ids of the samples they contain."""

    folder: str
    ids: frozenset[str]


@dataclass(frozen=True)
class ObserveProgress:
    """settings: what the statistics depend on; finished layers; layer -> what others hold; how
    often they were saved."""

    settings: Mapping[str, Any]
    finished: frozenset[int] = frozenset()
    saved: Mapping[int, SavedSums] = field(default_factory=dict)
    saves: int = 0

    def ids(self, layer: int) -> frozenset[str]:
        """Samples that a layer contains already."""
        return self.saved[layer].ids if layer in self.saved else frozenset()

    def with_saved(
        self, layers: Iterable[int], folder: str, ids: frozenset[str]
    ) -> ObserveProgress:
        """Some layers now hold more samples, in a new folder."""
        more = {layer: SavedSums(folder, self.ids(layer) | ids) for layer in layers}
        return replace(self, saved={**self.saved, **more}, saves=self.saves + 1)

    def with_finished(self, layers: Iterable[int]) -> ObserveProgress:
        """Some layers are written whole."""
        finished = self.finished | frozenset(layers)
        saved = {layer: one for layer, one in self.saved.items() if layer not in finished}
        return replace(self, finished=finished, saved=saved)


def read_progress(folder: Path, settings: Mapping[str, Any]) -> ObserveProgress:
    """What was saved in a folder with just these settings; nothing when it has no such record."""
    saved = store.read_progress(folder, settings)
    if saved is None:
        return ObserveProgress(settings)
    saved = {
        int(layer): SavedSums(one["folder"], frozenset(one["ids"]))
        for layer, one in saved["held"].items()
    }
    return ObserveProgress(settings, frozenset(saved["finished"]), saved, saved["saves"])


def write_progress(folder: Path, progress: ObserveProgress) -> None:
    """Make it what counts from now on, and drop the folders that it does not name."""
    saved = {
        layer: {"folder": one.folder, "ids": sorted(one.ids)}
        for layer, one in sorted(progress.saved.items())
    }
    record = {"finished": sorted(progress.finished), "held": saved, "saves": progress.saves}
    store.write_progress(folder, progress.settings, record)
    named = {one.folder for one in progress.saved.values()}
    for place in folder.iterdir():
        if place.is_dir() and place.name not in named:
            shutil.rmtree(place)


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Inside, the signals that would end this rank wait; the function says whether one has come.

    One that came ends the rank where the block ends, as ever.
    """
    came: list[int] = []
    before = {
        one: signal.signal(one, lambda number, _: came.append(number)) for one in STOP_SIGNALS
    }
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def stop_agreement(
    asked: Callable[[], bool], group: dist.ProcessGroup, lag: int
) -> Callable[[], bool]:
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
