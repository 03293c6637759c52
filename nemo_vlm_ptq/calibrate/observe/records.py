"""What a run of observe is given, keeps on a rank, and returns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from nemo_vlm_ptq.calibrate.observe.batch_tokens import BatchTokens
from nemo_vlm_ptq.calibrate.observe.hidden_states import HiddenStates
from nemo_vlm_ptq.calibrate.observe.progress import ObserveProgress
from nemo_vlm_ptq.families.base import Sample
from nemo_vlm_ptq.megatron.parallel_context import ParallelContext

MicroBatch = Sequence[Any]  # questions of one micro-batch; each has an `id`
# layer, tensors of its file, window that holds it
WindowConsumer = Callable[[int, Mapping[str, torch.Tensor], GPTModel | None], None]


@dataclass(frozen=True, kw_only=True)
class ObserveSetup:
    """The model on this rank and the preprocessing of its inputs.

    parallel: this rank's parallel context.
    windows: windows of this rank's pipeline stage, in order; every stage has as many.
    build_window: layers -> the window that holds them, without row-parallel linears. Called in a
        thread, one window ahead.
    feature_width: numbers per image token that the tower gives.
    build_vision: returns the module images -> features; used on the first pipeline stage.
    preprocess: (micro-batch, whether this rank encodes its images) -> samples. Without encoding,
        samples need no pixel values.
    """

    parallel: ParallelContext
    windows: Sequence[range]
    build_window: Callable[[range], GPTModel]
    feature_width: int
    build_vision: Callable[[], Any]
    preprocess: Callable[[MicroBatch, bool], list[Sample]]


@dataclass(frozen=True, kw_only=True)
class ObserveOptions:
    """What observe gathers, and its resources.

    moments: of second moments, what is gathered: sketch, whole, both or nothing.
    keep: whether statistics are written.
    device_states_bytes: bytes of the device's memory that hidden states may take between windows.
    host_states_bytes: bytes of host memory that they may take after that.
    save_every: micro-batches of a data rank between two saves.
    consume: called once, on one rank, with each layer, its tensors and its window.
    commit: called on every rank before the layers of a round are recorded as finished.
    """

    moments: Collection[str]
    keep: bool = True
    device_states_bytes: int = 0
    host_states_bytes: int = 0
    save_every: int = 64
    consume: WindowConsumer | None = None
    commit: Callable[[], None] | None = None


@dataclass
class ObserveResult:
    """What this rank has done in this run.

    files: statistics files that this rank reports.
    sha256: name -> sha256 of the files that this rank wrote.
    sample_ids: ids of the samples that this rank ran.
    tokens: numbers of text and image tokens that the statistics cover.
    """

    files: list[str] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)
    sample_ids: list[str] = field(default_factory=list)
    tokens: Sequence[int] = ()


@dataclass
class ObserveRun:
    """State of a run on this rank.

    assigned: this data rank's micro-batches; None where other data ranks have one more.
    last_layer: for each of them, the last layer whose statistics lack it.
    batches: the micro-batches with their token indices, once they are preprocessed.
    states: their hidden states.
    """

    setup: ObserveSetup
    options: ObserveOptions
    folder: Path
    result: ObserveResult
    progress: ObserveProgress
    assigned: list[MicroBatch | None]
    last_layer: list[int]
    states: HiddenStates
    batches: dict[int, BatchTokens] = field(default_factory=dict)
