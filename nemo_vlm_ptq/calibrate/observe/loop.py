"""Run the model over the calibration data and keep sufficient statistics of its activations.

Layers are observed in as many passes over the data as the memory of their second moments requires.
The sums gathered so far are saved at intervals and when a signal asks to stop, together with the
ids of the samples that they include. An interrupted run resumes from there on any number of ranks
and ends with the same bytes.
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
    defer_stop_signals,
    read_progress,
    stop_agreement,
    write_progress,
)
from nemo_vlm_ptq.calibrate.observe.reduction import LayerConsumer, load_saved_sums, reduce_and_save
from nemo_vlm_ptq.calibrate.statistics import LINEARS, layer_file
from nemo_vlm_ptq.distributed.layout import round_robin, split_evenly
from nemo_vlm_ptq.distributed.moment_strips import strip_numel
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import Sample
from nemo_vlm_ptq.megatron.forward import collate, encode_images, forward, is_encoding_rank
from nemo_vlm_ptq.megatron.parallel_context import ParallelContext, free_memory
from nemo_vlm_ptq.planning.forecast import PREFETCH_MICRO_BATCHES, SECOND_MOMENT_MEMORY_FRACTION
from nemo_vlm_ptq.utils.prefetch import prefetch
from nemo_vlm_ptq.utils.progress import progress_bar

MicroBatch = Sequence[Any]  # questions of one micro-batch; each has an `id`


@dataclass(frozen=True)
class ObserveSetup:
    """The model on this rank and the preprocessing of its inputs.

    model: decoder built for calibration, without row-parallel linears.
    vision: images -> features; used on the first pipeline stage.
    parallel: this rank's parallel context.
    preprocess: (micro-batch, whether this rank encodes its images) -> samples. Without encoding,
        samples need no pixel values.
    """

    model: GPTModel
    vision: Any
    parallel: ParallelContext
    preprocess: Callable[[MicroBatch, bool], list[Sample]]

    @property
    def layers(self) -> list[int]:
        """Indices of this rank's layers in the whole model."""
        return [block.layer_number - 1 for block in self.model.decoder.layers]


@dataclass(frozen=True)
class ObserveOptions:
    """What observe gathers, and its resources.

    second_moments: whether second moments are gathered.
    max_memory: bytes of second moments per rank; None: a fraction of the free memory.
    reserved_memory: bytes of free memory that are then left for everything else.
    save_every: micro-batches of a data rank between two saves.
    consume: called with each layer and its tensors while they are written.
    """

    second_moments: bool
    max_memory: int | None = None
    reserved_memory: int = 0
    save_every: int = 64
    consume: LayerConsumer = lambda layer, tensors: None


@dataclass
class ObserveResult:
    """What this rank has done in this run.

    files: statistics files that this rank reports.
    sha256: name -> sha256 of the files that this rank wrote.
    passes: for each pass over the data, ids of the samples that this rank ran.
    """

    files: list[str] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)
    passes: list[list[str]] = field(default_factory=list)


def observe(
    setup: ObserveSetup,
    micro_batches: Sequence[MicroBatch],
    folder: Path,
    options: ObserveOptions,
    settings: Mapping[str, Any],
) -> ObserveResult:
    """Write the statistics of every layer, resuming from the progress in `folder` (collective).

    Args:
        setup: this rank's model.
        micro_batches: all micro-batches, the same on every rank.
        folder: the stage's folder.
        options: what to gather, and memory and save interval.
        settings: what the statistics depend on; progress with other settings is ignored.

    Raises:
        UserError: an activation holds NaN or Inf (names layer, linear, modality and sample); the
            memory is less than one layer needs; activations are too large for exact sums.
    """
    parallel, result = setup.parallel, ObserveResult()
    progress = read_progress(folder, settings)
    if parallel.rank == 0:
        result.files += [layer_file(layer) for layer in progress.finished]
    remaining = [layer for layer in setup.layers if layer not in progress.finished]
    passes, reason = max(parallel.all_gather(_count_passes(setup, len(remaining), options)))
    if passes > 1:
        parallel.log(f"observe: {passes} passes over the data: {reason}")
    for index in range(passes):
        layers = split_evenly(remaining, passes, index)
        observer = Observer(setup.model, parallel, layers, options.second_moments)
        progress = _run_pass(setup, observer, micro_batches, folder, options, progress, result)
    return result


def _run_pass(
    setup: ObserveSetup,
    observer: Observer,
    micro_batches: Sequence[MicroBatch],
    folder: Path,
    options: ObserveOptions,
    progress: ObserveProgress,
    result: ObserveResult,
) -> ObserveProgress:
    """Run the data through the model once for the observer's layers, and save at intervals."""
    parallel = setup.parallel
    load_saved_sums(observer, folder, progress.saved)
    layers = [layer for part in parallel.all_gather(list(observer.blocks)) for layer in part]
    saved_ids, data_size = progress.sample_ids, parallel.layout.data
    remaining = [m for m in micro_batches if any(_sample_ids(m) - saved_ids(i) for i in layers)]
    assigned: list[MicroBatch | None] = [*round_robin(remaining, data_size, parallel.data_rank)]
    assigned += [None] * (-(-len(remaining) // data_size) - len(assigned))  # to save in step
    done: list[str] = []
    result.passes.append(done)
    with defer_stop_signals() as stop_requested:
        group = parallel_state.get_model_parallel_group()
        should_stop = stop_agreement(stop_requested, group, lag=parallel.layout.pipeline)
        for step in run_micro_batches(setup, observer, assigned, done, saved_ids):
            stop = should_stop()
            if stop or (step % options.save_every == 0 and step < len(assigned)):
                stop = any(parallel.all_gather(stop))
                progress = _save(observer, parallel, folder, progress, layers, done)
                if stop:
                    _exit_saved(parallel, progress, layers)
        if any(parallel.all_gather(stop_requested())):  # another replica may still have work
            progress = _save(observer, parallel, folder, progress, layers, done)
            _exit_saved(parallel, progress, layers)
    sha256 = reduce_and_save(observer, parallel, folder, exact=False, consume=options.consume)
    result.files += sha256
    result.sha256 |= sha256
    progress = progress.with_finished(layers)
    parallel.barrier()
    _commit(folder, parallel, progress)
    return progress


def run_micro_batches(
    setup: ObserveSetup,
    observer: Observer,
    micro_batches: Sequence[MicroBatch | None],
    done: list[str],
    saved_ids: Callable[[int], frozenset[str]],
) -> Iterator[int]:
    """Run this data rank's micro-batches and yield the number completed after each.

    Args:
        setup: this rank's model.
        observer: statistics of some of its layers.
        micro_batches: before preprocessing; None where other data ranks have one more.
        done: ids of completed samples are appended to it.
        saved_ids: layer -> ids of the samples that its statistics already include.
    """
    model, parallel, hidden = setup.model, setup.parallel, setup.model.config.hidden_size
    windows = _windows([batch for batch in micro_batches if batch is not None])

    def preprocess(window: Sequence[MicroBatch]) -> list[list[Sample]]:
        return [setup.preprocess(m, is_encoding_rank(parallel, i)) for i, m in enumerate(window)]

    prefetched = prefetch(windows, preprocess)
    features: Iterator[Any] = iter(())
    encoded: deque[list[Sample]] = deque()
    bar = progress_bar("observe", "batch", parallel.rank, len(micro_batches))
    with observer.attach_hooks(), bar:
        for step, micro_batch in enumerate(micro_batches, 1):
            if micro_batch is not None:
                if not encoded:
                    encoded.extend(next(prefetched)[1])
                    features = iter(encode_images(setup.vision, parallel, encoded, hidden))
                samples, ids = encoded.popleft(), _sample_ids(micro_batch)
                batch = collate(samples)
                active_layers = {layer for layer in observer.blocks if ids - saved_ids(layer)}
                observer.start_micro_batch(batch, active_layers)
                forward(model, parallel, batch, next(features))
                done += sorted(ids)
            bar.update()
            yield step


def _windows(micro_batches: Sequence[MicroBatch]) -> Iterator[Sequence[MicroBatch]]:
    """Yield the micro-batches whose images are encoded together: 1, then twice as many each time.

    The first window is small so that the decoder starts early.
    """
    start, size = 0, 1
    while start < len(micro_batches):
        yield micro_batches[start : start + size]
        start, size = start + size, min(2 * size, PREFETCH_MICRO_BATCHES)


def _sample_ids(micro_batch: Iterable[Any]) -> frozenset[str]:
    return frozenset(question.id for question in micro_batch)


def _save(
    observer: Observer,
    parallel: ParallelContext,
    folder: Path,
    progress: ObserveProgress,
    layers: Sequence[int],
    done: Sequence[str],
) -> ObserveProgress:
    """Save exact sums of `layers` and the ids of their samples (collective)."""
    name = f"save-{progress.num_saves + 1}"
    if parallel.rank == 0:
        shutil.rmtree(folder / name, ignore_errors=True)  # of an interrupted save
        (folder / name).mkdir()
    parallel.barrier()
    reduce_and_save(observer, parallel, folder / name, exact=True)
    sample_ids = frozenset(sample_id for part in parallel.all_gather(done) for sample_id in part)
    progress = progress.with_saved(layers, name, sample_ids)
    _commit(folder, parallel, progress)
    return progress


def _exit_saved(
    parallel: ParallelContext, progress: ObserveProgress, layers: Sequence[int]
) -> NoReturn:
    """Exit this rank after a stop request, once rank 0 has recorded the progress."""
    parallel.barrier()
    if parallel.rank == 0:
        count = len(progress.sample_ids(min(layers)))
        parallel.log(
            f"observe: stop requested: statistics of {count} samples are saved; "
            "run the same command again to resume"
        )
    raise SystemExit(128 + signal.SIGTERM)


def _commit(folder: Path, parallel: ParallelContext, progress: ObserveProgress) -> None:
    """Record the progress once all ranks have written their files."""
    parallel.barrier()
    if parallel.rank == 0:
        write_progress(folder, progress)


def _count_passes(setup: ObserveSetup, layers: int, options: ObserveOptions) -> tuple[int, str]:
    """Return the number of passes over the data that this rank needs, and the reason.

    Raises:
        UserError: the memory is less than one layer needs.
    """
    if not options.second_moments or not layers:
        return min(1, layers), ""
    parallel, block = setup.parallel, setup.model.decoder.layers[0]
    widths = [block.get_submodule(path).weight.shape[1] for path in LINEARS.values()]
    T, t = parallel.layout.tensor, parallel.tensor_rank
    layer_bytes = sum(2 * 8 * strip_numel(width, t, T) for width in widths)
    memory = options.max_memory
    if memory is None:
        free = free_memory(parallel.device) - options.reserved_memory
        memory = max(0, int(SECOND_MOMENT_MEMORY_FRACTION * free))
    fitting = int(memory // layer_bytes)
    reason = (
        f"second moments of one layer take {layer_bytes / 1e6:,.1f} MB per rank, "
        f"available: {memory / 1e6:,.1f} MB"
    )
    if not fitting:
        raise UserError(f"{reason}; increase calibration.max_statistics_memory or parallel.tensor")
    return -(-layers // fitting), reason
