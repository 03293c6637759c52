"""Progress of an interrupted observe: which layers are finished, and the saved sums of the others.

progress.json in the stage's folder records it. The file is replaced atomically after the files that
it refers to are written, so everything that it names exists.
"""

from __future__ import annotations

import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_vlm_ptq.workdir import store
from nemo_vlm_ptq.workdir.checked_files import read_hashes

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # sent by launchers, and by Slurm if told to


@dataclass(frozen=True)
class SavedSums:
    """Exact sums of a layer that is not finished.

    folder: name of the folder that holds the layer's file.
    sample_ids: ids of the samples that the sums include.
    """

    folder: str
    sample_ids: frozenset[str]


@dataclass(frozen=True)
class ObserveProgress:
    """Progress of observe over all ranks.

    settings: what the statistics depend on.
    finished: layers whose statistics are complete, and were handed on.
    saved: layer -> saved sums, of layers that are not finished.
    num_saves: how often sums were saved.
    tokens: numbers of text and image tokens of the finished layers; empty if there are none.
    sha256: of the files of statistics and of saved sums, by name in the stage's folder.
    """

    settings: Mapping[str, Any]
    finished: frozenset[int] = frozenset()
    saved: Mapping[int, SavedSums] = field(default_factory=dict)
    num_saves: int = 0
    tokens: tuple[int, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)

    def lacks(self, layer: int, sample_ids: frozenset[str]) -> bool:
        """Return whether a layer's statistics do not include all of the samples."""
        return layer not in self.finished and bool(sample_ids - self.sample_ids(layer))

    def sample_ids(self, layer: int) -> frozenset[str]:
        """Return the ids of the samples that a layer's saved sums include."""
        return self.saved[layer].sample_ids if layer in self.saved else frozenset()

    def with_saved(
        self,
        layers: Iterable[int],
        folder: str,
        sample_ids: frozenset[str],
        sha256: Mapping[str, str],
    ) -> ObserveProgress:
        """Return the progress after sums of `layers`, with more samples, were saved in `folder`.

        sha256: of the files in that folder, by name there.
        """
        hashes = {**self.sha256, **{f"{folder}/{name}": one for name, one in sha256.items()}}
        updated = {
            layer: SavedSums(folder=folder, sample_ids=self.sample_ids(layer) | sample_ids)
            for layer in layers
        }
        number = self.num_saves + 1
        return replace(self, saved={**self.saved, **updated}, num_saves=number, sha256=hashes)

    def with_finished(
        self, layers: Iterable[int], tokens: Sequence[int], sha256: Mapping[str, str]
    ) -> ObserveProgress:
        """Return the progress after the statistics of `layers` were completed."""
        finished = self.finished | frozenset(layers)
        saved = {layer: sums for layer, sums in self.saved.items() if layer not in finished}
        hashes = {**self.sha256, **sha256}
        return replace(self, finished=finished, saved=saved, tokens=tuple(tokens), sha256=hashes)


def read_progress(folder: Path, settings: Mapping[str, Any]) -> ObserveProgress:
    """Read the progress in a folder; it is empty without a record of exactly these settings."""
    record = store.read_progress(folder, settings)
    if record is None:
        return ObserveProgress(settings)
    saved = {
        int(layer): SavedSums(folder=sums["folder"], sample_ids=frozenset(sums["ids"]))
        for layer, sums in record["held"].items()
    }
    return ObserveProgress(
        settings,
        finished=frozenset(record["finished"]),
        saved=saved,
        num_saves=record["saves"],
        tokens=tuple(record["tokens"]),
        sha256=read_hashes(folder),
    )


def write_progress(folder: Path, progress: ObserveProgress) -> None:
    """Replace the record in a folder and remove the save folders that it no longer names."""
    saved = {
        layer: {"folder": sums.folder, "ids": sorted(sums.sample_ids)}
        for layer, sums in sorted(progress.saved.items())
    }
    record = {
        "finished": sorted(progress.finished),
        "held": saved,
        "saves": progress.num_saves,
        "tokens": progress.tokens,
    }
    referenced = {sums.folder for sums in progress.saved.values()}
    hashes = {  # without those of saves that are removed below
        name: sha256
        for name, sha256 in progress.sha256.items()
        if "/" not in name or name.partition("/")[0] in referenced
    }
    store.write_progress(folder, progress.settings, record, hashes)
    for path in folder.iterdir():
        if path.is_dir() and path.name not in referenced:
            shutil.rmtree(path)


@contextmanager
def defer_stop_signals() -> Iterator[Callable[[], bool]]:
    """Defer STOP_SIGNALS to the end of the context; yield whether one has been received."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in STOP_SIGNALS
    }
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


def stop_agreement(
    stop_requested: Callable[[], bool], group: dist.ProcessGroup, lag: int
) -> Callable[[], bool]:
    """Return a function that tells all ranks of a model replica alike whether to stop.

    It must be called after each micro-batch (collective).

    Args:
        stop_requested: whether this rank has received a stop signal.
        group: ranks of the replica.
        lag: micro-batches between a request and the stop. The reductions overlap with those
            micro-batches, and with the ones that pipeline stages have in flight, so no rank waits.
    """
    pending: deque[tuple[torch.Tensor, Any]] = deque()

    def stop() -> bool:
        flag = torch.tensor(int(stop_requested()))
        pending.append((flag, dist.all_reduce(flag, dist.ReduceOp.MAX, group, async_op=True)))
        if len(pending) <= lag:
            return False
        flag, handle = pending.popleft()
        handle.wait()
        return bool(flag)

    return stop
