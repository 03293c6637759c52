"""Run the calibration data through the model, window by window, and reduce its statistics.

A window is a run of consecutive layers. All micro-batches of a rank pass one window before the
next; their hidden states stand in between, and the next window's weights are read meanwhile. A
sample passes every layer once, and its arithmetic does not depend on the windows.

Pipeline stages take turns in rounds: stage s takes its window w in round s (n - 1) + w of n windows
per stage, so that its first window receives what the last window of the stage before sends. With a
single window all stages work in the one round.

Finished windows are recorded, and the sums of the current one at intervals and when a signal asks
to stop. An interrupted run resumes on any number of ranks: hidden states are recomputed by a plain
forward pass, and the result has the same bytes.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from nemo_vlm_ptq.calibrate.observe.hidden_states import open_hidden_states
from nemo_vlm_ptq.calibrate.observe.micro_batches import run_micro_batches, sample_ids
from nemo_vlm_ptq.calibrate.observe.observer import Observer
from nemo_vlm_ptq.calibrate.observe.progress import (
    ObserveProgress,
    defer_stop_signals,
    read_progress,
    stop_agreement,
    write_progress,
)
from nemo_vlm_ptq.calibrate.observe.records import (
    MicroBatch,
    ObserveOptions,
    ObserveResult,
    ObserveRun,
    ObserveSetup,
)
from nemo_vlm_ptq.calibrate.observe.reduction import load_saved_sums, reduce_layers
from nemo_vlm_ptq.calibrate.observe.window_loader import WindowLoader
from nemo_vlm_ptq.calibrate.statistics import layer_file
from nemo_vlm_ptq.distributed.layout import round_robin


def observe(
    setup: ObserveSetup,
    micro_batches: Sequence[MicroBatch],
    folder: Path,
    options: ObserveOptions,
    settings: Mapping[str, Any],
) -> ObserveResult:
    """Observe every layer, resuming from the progress in `folder` (collective).

    Args:
        setup: this rank's windows.
        micro_batches: all micro-batches, the same on every rank.
        folder: the stage's folder.
        options: what to gather, and memory and save interval.
        settings: what the statistics depend on; progress with other settings is ignored.

    Raises:
        UserError: an activation holds NaN or Inf (names layer, linear, modality and sample), or
            activations are too large for exact sums.
    """
    parallel, result = setup.parallel, ObserveResult()
    progress = read_progress(folder, settings)
    if parallel.rank == 0 and options.keep:
        result.files += [layer_file(layer) for layer in progress.finished]
        result.sha256 |= progress.sha256
    own = [layer for window in setup.windows for layer in window]
    layers = [layer for part in parallel.all_gather(own) for layer in part]
    lacking = {id(m): _last_layer(m, layers, progress) for m in micro_batches}
    remaining = [m for m in micro_batches if lacking[id(m)] >= 0]
    data_size, path = parallel.layout.data, folder / f"hidden_states.{parallel.rank}"
    assigned: list[MicroBatch | None] = [*round_robin(remaining, data_size, parallel.data_rank)]
    assigned += [None] * (-(-len(remaining) // data_size) - len(assigned))  # to save in step
    last_layer = [-1 if m is None else lacking[id(m)] for m in assigned]
    room = options.device_states_bytes, options.host_states_bytes
    with open_hidden_states(parallel.device, *room, path) as states:
        run = ObserveRun(setup, options, folder, result, progress, assigned, last_layer, states)
        _run_rounds(run, max(lacking.values(), default=-1))
    result.tokens = run.progress.tokens
    return result


def _last_layer(micro_batch: MicroBatch, layers: Iterable[int], progress: ObserveProgress) -> int:
    """Return the last layer whose statistics lack a sample of the micro-batch, -1 if none."""
    ids = sample_ids(micro_batch)
    return max((i for i in layers if progress.lacks(i, ids)), default=-1)


def _run_rounds(run: ObserveRun, last_layer: int) -> None:
    """Take this stage's windows in the rounds that have something to do for any stage."""
    setup, parallel = run.setup, run.setup.parallel
    count, stage = len(setup.windows), parallel.pipeline_rank
    needed = [window for window in setup.windows if window.start <= last_layer]
    with WindowLoader(setup.build_window, needed, parallel.device) as loader:
        for number in range(parallel.layout.pipeline * (count - 1) + 1):
            index = number - stage * (count - 1)
            mine = setup.windows[index] if 0 <= index < count else range(0)
            works = bool(mine) and mine.start <= last_layer
            if not any(parallel.all_gather(works)):
                continue
            start, model = time.monotonic(), loader.take() if works else None
            _run_window(run, model, mine if works else range(0))
            del model  # before the loader starts the window after the next
            if works and count > 1 and parallel.data_rank == parallel.tensor_rank == 0:
                seconds = time.monotonic() - start
                parallel.log(f"observe: layers {mine[0]} to {mine[-1]} are done in {seconds:.1f} s")


def _run_window(run: ObserveRun, model: GPTModel | None, window: range) -> None:
    """Run the data through one window, save at intervals, and reduce its statistics."""
    parallel, options = run.setup.parallel, run.options
    unfinished = [layer for layer in window if layer not in run.progress.finished]
    observer = Observer(model, parallel, unfinished, options.moments)
    load_saved_sums(observer, run.folder, run.progress.saved)
    layers = [layer for part in parallel.all_gather(unfinished) for layer in part]
    done: list[str] = []
    with defer_stop_signals() as stop_requested:
        group = parallel_state.get_model_parallel_group()
        should_stop = stop_agreement(stop_requested, group, lag=parallel.layout.pipeline)
        for step in run_micro_batches(run, model, window, observer, done):
            stop = should_stop()
            if stop or (step % options.save_every == 0 and step < len(run.assigned)):
                stop = any(parallel.all_gather(stop))
                _save(run, observer, layers, done)
                if stop:
                    _exit_saved(run, layers)
        if any(parallel.all_gather(stop_requested())):  # another replica may still have work
            _save(run, observer, layers, done)
            _exit_saved(run, layers)
        if not run.result.sample_ids:
            run.result.sample_ids = list(done)
        _finish_window(run, observer, model, layers)
        if any(parallel.all_gather(stop_requested())):
            _exit_saved(run, layers)


def _finish_window(
    run: ObserveRun, observer: Observer, model: GPTModel | None, layers: Sequence[int]
) -> None:
    """Reduce the statistics of a round, hand them on, and record its layers as finished."""
    parallel, options = run.setup.parallel, run.options
    folder = run.folder if options.keep else None

    def consume(layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        if options.consume is not None:
            options.consume(layer, tensors, model)

    reduced = reduce_layers(observer, parallel, folder, exact=False, consume=consume)
    run.result.files += reduced.sha256
    run.result.sha256 |= reduced.sha256
    parallel.barrier()
    if options.commit is not None:
        options.commit()
    gathered = parallel.all_gather((reduced.tokens, reduced.sha256))
    counted = (tokens for tokens, _ in gathered if tokens)
    tokens = next(counted, run.progress.tokens)  # none where all layers were finished before
    run.progress = run.progress.with_finished(layers, tokens, _merged(gathered))
    _commit(run)


def _save(run: ObserveRun, observer: Observer, layers: Sequence[int], done: Sequence[str]) -> None:
    """Save exact sums of `layers` and the ids of their samples (collective)."""
    parallel, name = run.setup.parallel, f"save-{run.progress.num_saves + 1}"
    if parallel.rank == 0:
        shutil.rmtree(run.folder / name, ignore_errors=True)  # of an interrupted save
        (run.folder / name).mkdir()
    parallel.barrier()
    reduced = reduce_layers(observer, parallel, run.folder / name, exact=True)
    gathered = parallel.all_gather((done, reduced.sha256))
    sample_ids = frozenset(sample_id for part, _ in gathered for sample_id in part)
    run.progress = run.progress.with_saved(layers, name, sample_ids, _merged(gathered))
    _commit(run)


def _merged(gathered: Iterable[tuple[Any, Mapping[str, str]]]) -> dict[str, str]:
    """Return the sha256 of the files of all ranks."""
    return {name: sha256 for _, hashes in gathered for name, sha256 in hashes.items()}


def _exit_saved(run: ObserveRun, layers: Sequence[int]) -> NoReturn:
    """Exit this rank after a stop request, once rank 0 has recorded the progress."""
    parallel = run.setup.parallel
    parallel.barrier()
    if parallel.rank == 0:
        count, finished = len(run.progress.sample_ids(min(layers))), len(run.progress.finished)
        before = f"{finished} layers are finished and " if finished else ""
        parallel.log(
            f"observe: stop requested: {before}statistics of {count} samples are saved; "
            "run the same command again to resume"
        )
    raise SystemExit(128 + signal.SIGTERM)


def _commit(run: ObserveRun) -> None:
    """Record the progress once all ranks have written their files."""
    run.setup.parallel.barrier()
    if run.setup.parallel.rank == 0:
        write_progress(run.folder, run.progress)
