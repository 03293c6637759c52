"""Observe: run the model over calibration data and keep sufficient statistics, no more.

Layers are taken in as many passes as the memory of their second moments asks for. What has been
gathered is saved now and then, and when a signal asks to stop, with the samples that it contains:
a run that was stopped goes on from there, on any number of ranks, and ends with the same bytes.
"""

from __future__ import annotations

import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from nemo_vlm_ptq.calibrate.observe.observer import Observer
from nemo_vlm_ptq.calibrate.observe.progress import (
    ObserveProgress,
    read_progress,
    stop_agreement,
    stop_requested,
    write_progress,
)
from nemo_vlm_ptq.calibrate.observe.reduction import LayerConsumer, load_saved_sums, reduce_and_save
from nemo_vlm_ptq.calibrate.statistics import LINEARS, layer_file
from nemo_vlm_ptq.distributed.layout import round_robin, split_evenly, strip_entries
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import Sample
from nemo_vlm_ptq.megatron.forward import collate, encode_images, encodes_images, forward
from nemo_vlm_ptq.megatron.parallel_context import ParallelContext, free_memory
from nemo_vlm_ptq.planning.forecast import MEMORY_FRACTION, PREFETCH_MICRO_BATCHES
from nemo_vlm_ptq.utils.prefetch import prefetch
from nemo_vlm_ptq.utils.progress import progress_bar

MicroBatch = Sequence[Any]  # the questions of one micro-batch; each has an `id`


@dataclass(frozen=True)
class ObserveSetup:
    """A model on this rank, and how samples are made for it.

    model: built without row-parallel linears; vision: pixels -> features, used on the first
    pipeline stage; prepare: makes the samples of a micro-batch when their turn comes, and whether
    this rank looks at their images: else they may be without values.
    """

    model: GPTModel
    vision: Any
    parallel: ParallelContext
    prepare: Callable[[MicroBatch, bool], list[Sample]]

    @property
    def layers(self) -> list[int]:
        """This rank's layers, counted over the whole model."""
        return [block.layer_number - 1 for block in self.model.decoder.layers]


@dataclass(frozen=True)
class ObserveOptions:
    """What is gathered, and how.

    moments: second moments are wanted; memory: bytes of them on a rank, None: what is free;
    working: bytes that are left free for all else then; save_every: micro-batches of a rank between
    two saves; consume: what a layer's tensors go to as well, while they are written.
    """

    moments: bool
    memory: int | None = None
    working: int = 0
    save_every: int = 64
    consume: LayerConsumer = lambda layer, tensors: None


@dataclass
class ObserveResult:
    """What this rank has done in this run.

    files: that it answers for; sha256: of those it wrote, by name; passes: samples it ran.
    """

    files: list[str] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)
    passes: list[list[str]] = field(default_factory=list)


def observe(
    work: ObserveSetup,
    chunks: Sequence[MicroBatch],
    folder: Path,
    limits: ObserveOptions,
    settings: Mapping[str, Any],
) -> ObserveResult:
    """Statistics of every layer into a folder, going on from what lies there (collective).

    Args:
        work: this rank's model.
        chunks: all micro-batches, the same on every rank.
        folder: the stage's folder.
        limits: what is gathered, in how much memory, and how often it is saved.
        settings: what the statistics depend on; saved ones of other settings are not used.

    Raises:
        UserError: NaN or Inf in an activation (names layer, linear, modality and sample); less
            memory than one layer takes; activations too large for exact sums.
    """
    parallel, progress, run = work.parallel, read_progress(folder, settings), ObserveResult()
    if parallel.rank == 0:
        run.files += [layer_file(layer) for layer in progress.finished]
    left = [layer for layer in work.layers if layer not in progress.finished]
    passes, why = max(parallel.gather(_passes(work, len(left), limits)))
    if passes > 1:
        parallel.log(f"observe: {passes} passes over the data: {why}")
    for share in range(passes):
        observer = Observer(work.model, parallel, split_evenly(left, passes, share), limits.moments)
        progress = _one_pass(work, observer, chunks, folder, limits, progress, run)
    return run


def _one_pass(
    work: ObserveSetup,
    observer: Observer,
    chunks: Sequence[MicroBatch],
    folder: Path,
    limits: ObserveOptions,
    progress: ObserveProgress,
    run: ObserveResult,
) -> ObserveProgress:
    """The data once through the model for the layers of an observer, saved on the way."""
    parallel = work.parallel
    load_saved_sums(observer, folder, progress.saved)
    together = [layer for part in parallel.gather(list(observer.blocks)) for layer in part]
    todo = [c for c in chunks if any(_ids(c) - progress.ids(layer) for layer in together)]
    mine: list[MicroBatch | None] = [*round_robin(todo, parallel.layout.data, parallel.data)]
    mine += [None] * (-(-len(todo) // parallel.layout.data) - len(mine))  # all ranks save together
    done: list[str] = []
    run.passes.append(done)
    with stop_requested() as asked:
        stages, replica = parallel.layout.pipeline, parallel_state.get_model_parallel_group()
        agreed = stop_agreement(asked, replica, stages)
        for step in run_micro_batches(work, observer, mine, done, progress.ids):
            stop = agreed()
            if stop or (step % limits.save_every == 0 and step < len(mine)):
                stop = any(parallel.gather(stop))
                progress = _save(observer, parallel, folder, progress, together, done)
                if stop:
                    _end(parallel, progress, together)
        if any(parallel.gather(asked())):  # also where another replica has not come to its end
            progress = _save(observer, parallel, folder, progress, together, done)
            _end(parallel, progress, together)
    consume = limits.consume
    written = reduce_and_save(observer, parallel, folder, exact=False, consume=consume)
    run.files += written
    run.sha256 |= written
    progress = progress.with_finished(together)
    parallel.barrier()
    _settle(folder, parallel, progress)
    return progress


def run_micro_batches(
    work: ObserveSetup,
    observer: Observer,
    chunks: Sequence[MicroBatch | None],
    done: list[str],
    ids: Callable[[int], frozenset[str]],
) -> Iterator[int]:
    """Run this data rank's micro-batches; yields how many are through after each.

    Args:
        work: this rank's model.
        observer: of some of its layers.
        chunks: not prepared yet; None keeps step with ranks that have one more.
        done: ids of samples are added to it.
        ids: layer -> samples that it contains already.
    """
    model, parallel, hidden = work.model, work.parallel, work.model.config.hidden_size
    windows = _windows([chunk for chunk in chunks if chunk is not None])

    def prepare(window: Sequence[MicroBatch]) -> list[list[Sample]]:
        return [work.prepare(chunk, encodes_images(parallel, i)) for i, chunk in enumerate(window)]

    prepared = prefetch(windows, prepare)
    features: Iterator[Any] = iter(())
    batches: deque[list[Sample]] = deque()
    bar = progress_bar("observe", "batch", parallel.rank, len(chunks))
    with observer.attach_hooks(), bar:
        for step, chunk in enumerate(chunks, 1):
            if chunk is not None:
                if not batches:
                    batches.extend(next(prepared)[1])
                    features = iter(encode_images(work.vision, parallel, batches, hidden))
                samples, own = batches.popleft(), _ids(chunk)
                batch = collate(samples)
                observer.start_micro_batch(
                    batch, {layer for layer in observer.blocks if own - ids(layer)}
                )
                forward(model, parallel, batch, next(features))
                done += sorted(own)
            bar.update()
            yield step


def _windows(chunks: Sequence[MicroBatch]) -> Iterator[Sequence[MicroBatch]]:
    """A micro-batch by itself, so that the model has not long to wait; then ever twice as many."""
    start, size = 0, 1
    while start < len(chunks):
        yield chunks[start : start + size]
        start, size = start + size, min(2 * size, PREFETCH_MICRO_BATCHES)


def _ids(chunk: Iterable[Any]) -> frozenset[str]:
    return frozenset(item.id for item in chunk)


def _save(
    observer: Observer,
    parallel: ParallelContext,
    folder: Path,
    progress: ObserveProgress,
    together: Sequence[int],
    done: Sequence[str],
) -> ObserveProgress:
    """What all ranks have of their layers, with the samples that it contains (collective)."""
    place = f"save-{progress.saves + 1}"
    _fresh(folder / place, parallel)
    reduce_and_save(observer, parallel, folder / place, exact=True)
    seen = frozenset(name for part in parallel.gather(done) for name in part)
    progress = progress.with_saved(together, place, seen)
    _settle(folder, parallel, progress)
    return progress


def _end(parallel: ParallelContext, progress: ObserveProgress, together: Sequence[int]) -> NoReturn:
    """End this rank, as it was asked to, once rank 0 has written what counts."""
    parallel.barrier()
    if parallel.rank == 0:
        count = len(progress.ids(min(together)))
        parallel.log(f"observe: asked to stop; {count} samples are saved, run it again to go on")
    raise SystemExit(128 + signal.SIGTERM)


def _fresh(place: Path, parallel: ParallelContext) -> None:
    """An empty folder for all ranks; there may be one that an interrupted save left."""
    if parallel.rank == 0:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    parallel.barrier()


def _settle(folder: Path, parallel: ParallelContext, progress: ObserveProgress) -> None:
    """What was written by all ranks counts from now on."""
    parallel.barrier()
    if parallel.rank == 0:
        write_progress(folder, progress)


def _passes(work: ObserveSetup, layers: int, limits: ObserveOptions) -> tuple[int, str]:
    """Times that the data runs through this rank for so many layers, and why.

    Raises:
        UserError: there is less memory than one layer takes.
    """
    if not limits.moments or not layers:
        return min(1, layers), ""
    T, t = work.parallel.layout.tensor, work.parallel.tensor
    block, layer = work.model.decoder.layers[0], 0
    for path in LINEARS.values():
        layer += 2 * 8 * strip_entries(block.get_submodule(path).weight.shape[1], t, T)
    room = limits.memory
    if room is None:
        room = max(0, int(MEMORY_FRACTION * (free_memory(work.parallel.device) - limits.working)))
    fitting = int(room // layer)
    why = (
        f"second moments of one layer take {layer / 1e6:,.1f} MB on a rank, and there is room for "
        f"{room / 1e6:,.1f} MB"
    )
    if not fitting:
        raise UserError(f"{why}; raise calibration.max_statistics_memory or parallel.tensor")
    return -(-layers // fitting), why
