"""Preprocess this rank's micro-batches once, and run them through one window after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from nemo_vlm_ptq.calibrate.observe.batch_tokens import index_tokens
from nemo_vlm_ptq.calibrate.observe.observer import Observer
from nemo_vlm_ptq.calibrate.observe.records import MicroBatch, ObserveRun
from nemo_vlm_ptq.families.base import Sample
from nemo_vlm_ptq.megatron.forward import collate, encode_images, forward, is_encoding_rank
from nemo_vlm_ptq.planning.forecast import PREFETCH_MICRO_BATCHES
from nemo_vlm_ptq.utils.prefetch import prefetch
from nemo_vlm_ptq.utils.progress import progress_bar


def run_micro_batches(
    run: ObserveRun, model: GPTModel | None, window: range, observer: Observer, done: list[str]
) -> Iterator[int]:
    """Run this data rank's micro-batches through a window; yield the number completed after each.

    Args:
        run: state of the run.
        model: the window; None in a round in which this stage waits.
        window: its layers.
        observer: statistics of its unfinished layers.
        done: ids of completed samples are appended to it.
    """
    is_first = model is not None and not run.batches
    features = _preprocess(run) if is_first else repeat(None)
    label = f"observe layers {window.start}-{window.stop - 1}" if window else "observe"
    bar = progress_bar(label, "batch", run.setup.parallel.rank, len(run.assigned))
    with observer.attach_hooks(), bar:
        for index, (micro_batch, image_features) in enumerate(
            zip(run.assigned, features, strict=False)
        ):
            if micro_batch is not None and model is not None:
                if run.last_layer[index] >= window.start:
                    _run_micro_batch(run, model, window, observer, index, image_features)
                done += sorted(sample_ids(micro_batch))
            bar.update()
            yield index + 1


def _run_micro_batch(
    run: ObserveRun,
    model: GPTModel,
    window: range,
    observer: Observer,
    index: int,
    features: torch.Tensor | None,
) -> None:
    """Run one micro-batch through a window; keep or send its hidden states if they are needed."""
    setup, tokens, micro_batch = run.setup, run.batches[index], run.assigned[index]
    assert micro_batch is not None
    ids, needed = sample_ids(micro_batch), run.last_layer[index] >= window.stop
    observer.start_micro_batch(tokens, {i for i in observer.layers if run.progress.lacks(i, ids)})
    ends_stage = window.stop == setup.windows[-1].stop
    states = None if window.start == setup.windows[0].start else run.states.get(index)
    output = forward(
        model, setup.parallel, tokens.batch, features, states, ends_stage=ends_stage and needed
    )
    if needed and not ends_stage:
        assert output is not None
        run.states.put(index, output)


def _preprocess(run: ObserveRun) -> Iterator[torch.Tensor | None]:
    """Preprocess and collate the micro-batches, and yield the image features of each.

    The tower is freed at the end.
    """
    setup, parallel, width = run.setup, run.setup.parallel, run.setup.feature_width
    vision = setup.build_vision() if parallel.first_stage else None
    groups = _encoding_groups([batch for batch in run.assigned if batch is not None])

    def preprocess(group: Sequence[MicroBatch]) -> list[list[Sample]]:
        return [setup.preprocess(m, is_encoding_rank(parallel, i)) for i, m in enumerate(group)]

    index = 0
    for _, encoded in prefetch(groups, preprocess):
        features = encode_images(vision, parallel, encoded, width)
        for samples, image_features in zip(encoded, features, strict=True):
            run.batches[index] = index_tokens(
                collate(samples), parallel.device, sketches="sketch" in run.options.moments
            )
            yield image_features
            index += 1
    yield from repeat(None)  # for micro-batches that are None


def _encoding_groups(micro_batches: Sequence[MicroBatch]) -> Iterator[Sequence[MicroBatch]]:
    """Yield the micro-batches whose images are encoded together: 1, then twice as many each time.

    The first group is small so that the decoder starts early.
    """
    start, size = 0, 1
    while start < len(micro_batches):
        yield micro_batches[start : start + size]
        start, size = start + size, min(2 * size, PREFETCH_MICRO_BATCHES)


def sample_ids(micro_batch: Iterable[Any]) -> frozenset[str]:
    """Return the ids of the samples of a micro-batch."""
    return frozenset(question.id for question in micro_batch)
