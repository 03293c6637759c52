"""Observe: run the model over calibration data once and keep sufficient statistics, no more.

Every statistic is a maximum or a sum over micro-batches, and micro-batches are formed by sample
ids, so the result does not depend on how data or layers are spread over ranks. Under tensor
parallelism the input of a row-parallel linear is gathered, and each rank accumulates its rows of
the second moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from nemo_vlm_ptq.calibrate.statistics import LINEARS, ROW_PARALLEL, UNIT, save_layer
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import IMAGE, TEXT, Sample
from nemo_vlm_ptq.megatron.forward import Batch, collate, encode_images, forward
from nemo_vlm_ptq.megatron.session import Session
from nemo_vlm_ptq.progress import progress_bar

Chunk = Sequence[Any]  # the questions of one micro-batch
MODALITIES = (TEXT, IMAGE)
MODALITY_NAMES = {TEXT: "text", IMAGE: "image"}


@dataclass
class Accumulator:
    """Running statistics of one linear's input on this rank; `moment` is this rank's rows."""

    width: int
    rows: slice
    moments: bool
    device: torch.device
    tensors: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        count, device = len(MODALITIES), self.device
        self.tensors = {
            "amax": torch.zeros(count, self.width, device=device),
            "sum": torch.zeros(count, self.width, dtype=torch.int64, device=device),
            "tokens": torch.zeros(count, dtype=torch.int64, device=device),
        }
        if self.moments:
            height = self.rows.stop - self.rows.start
            shape = (count, height, self.width)
            self.tensors["moment"] = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, modality: int, x_TK: torch.Tensor) -> None:
        """Take in the tokens of one modality, [T,K] float32."""
        own, magnitude = self.tensors, x_TK.abs()
        own["amax"][modality] = torch.maximum(own["amax"][modality], magnitude.amax(dim=0))
        own["sum"][modality] += (magnitude.double() / UNIT).round().long().sum(dim=0)
        own["tokens"][modality] += x_TK.shape[0]
        if self.moments:
            own["moment"][modality] += x_TK[:, self.rows].T @ x_TK


class Observer:
    """Hooks on the linears of this rank's layers, and what they have seen."""

    def __init__(self, model: GPTModel, session: Session, moments: bool) -> None:
        self.session = session
        self.moments = moments
        self.batch: Batch | None = None
        self.layers = {block.layer_number - 1: block for block in model.decoder.layers}
        self.linears: dict[tuple[int, str], Accumulator] = {}
        self.attention = {layer: torch.zeros(2, device=session.device) for layer in self.layers}
        self.tokens = dict.fromkeys(MODALITIES, 0)
        count, index = session.layout.tensor, session.tensor
        for layer, block in self.layers.items():
            for name, path in LINEARS.items():
                shards = count if name in ROW_PARALLEL else 1
                width = block.get_submodule(path).weight.shape[1] * shards
                rows = slice(width // count * index, width // count * (index + 1))
                self.linears[layer, name] = Accumulator(width, rows, moments, session.device)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are in place inside this block."""
        handles = []
        for layer, block in self.layers.items():
            for name, path in LINEARS.items():
                hook = self._hook(layer, name)
                handles.append(block.get_submodule(path).register_forward_pre_hook(hook))
            block.self_attention.core_attention.watch = self._watch(layer)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block in self.layers.values():
                block.self_attention.core_attention.watch = None

    def _hook(self, layer: int, name: str) -> Any:
        gathered = name in ROW_PARALLEL

        def hook(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            x_SBK = args[0].detach()
            x_BSK = (self._gather(x_SBK) if gathered else x_SBK).transpose(0, 1)
            self._add(layer, name, x_BSK)

        return hook

    def _add(self, layer: int, name: str, x_BSK: torch.Tensor) -> None:
        assert self.batch is not None
        kinds = self.batch.modality.to(x_BSK.device)
        for index, modality in enumerate(MODALITIES):
            chosen = kinds == modality
            x_TK = x_BSK[chosen].float()
            if not len(x_TK):
                continue
            if not bool(x_TK.isfinite().all()):
                finite = torch.where(chosen, x_BSK.isfinite().all(dim=2), True).all(dim=1)
                sample = self.batch.ids[int((~finite).nonzero()[0])]
                raise UserError(
                    f"activation holds NaN or Inf: layer {layer}, input of {name}, "
                    f"{MODALITY_NAMES[modality]} tokens of sample {sample}"
                )
            self.linears[layer, name].add(index, x_TK)

    def _gather(self, x_SBK: torch.Tensor) -> torch.Tensor:
        count = self.session.layout.tensor
        if count == 1:
            return x_SBK
        shards = [torch.empty_like(x_SBK) for _ in range(count)]
        dist.all_gather(shards, x_SBK.contiguous(), group=self.session.tensor_group)
        return torch.cat(shards, dim=-1)

    def _watch(self, layer: int) -> Any:
        def watch(key: torch.Tensor, value: torch.Tensor) -> None:
            assert self.batch is not None
            real = (self.batch.modality != 0).T.to(key.device)
            seen = torch.stack([x[real].abs().amax().float() for x in (key, value)])
            self.attention[layer] = torch.maximum(self.attention[layer], seen)

        return watch


def observe(
    model: GPTModel,
    vision: Any,
    session: Session,
    chunks: Sequence[Chunk],
    prepare: Callable[[Chunk], list[Sample]],
    *,
    moments: bool,
) -> Observer:
    """Run micro-batches through the model and collect statistics.

    Args:
        model: this rank's part of the decoder.
        vision: pixels -> features; used on the first pipeline stage.
        session: this rank's place.
        chunks: this data rank's micro-batches, not prepared yet.
        prepare: makes the samples of a micro-batch, when their turn comes.
        moments: second moments are wanted.

    Raises:
        UserError: NaN or Inf in an activation; names layer, linear, modality and sample.
    """
    observer = Observer(model, session, moments)
    window = 8 * session.layout.tensor  # micro-batches whose images are looked at together
    with observer.watching(), progress_bar("observe", "batch", session.rank, len(chunks)) as bar:
        for start in range(0, len(chunks), window):
            batches = [prepare(chunk) for chunk in chunks[start : start + window]]
            flat = [sample for batch in batches for sample in batch]
            features = iter(encode_images(vision, session, flat, model.config.hidden_size))
            for batch in batches:
                observer.batch = collate(batch)
                for modality in MODALITIES:
                    observer.tokens[modality] += int((observer.batch.modality == modality).sum())
                forward(model, session, observer.batch, [next(features) for _ in batch])
                bar.update()
    return observer


def reduce_and_save(observer: Observer, session: Session, folder: Path) -> list[str]:
    """Put the ranks' statistics together and write each layer once; returns this rank's files.

    Layers are dealt over the data ranks; of those, tensor rank 0 writes.
    """
    written = []
    for position, layer in enumerate(sorted(observer.layers)):
        tensors: dict[str, torch.Tensor] = {}
        for name in LINEARS:
            for key, value in observer.linears[layer, name].tensors.items():
                operation = dist.ReduceOp.MAX if key == "amax" else dist.ReduceOp.SUM
                dist.all_reduce(value, operation, group=session.data_group)
                tensors[f"{name}.{key}"] = value
            if observer.moments:
                moment = _join_rows(tensors[f"{name}.moment"], session)
                tensors[f"{name}.moment"] = moment.float()
        seen = observer.attention[layer]
        for group in (session.data_group, session.tensor_group):
            dist.all_reduce(seen, dist.ReduceOp.MAX, group=group)
        tensors["key.amax"], tensors["value.amax"] = seen[:1], seen[1:]
        if session.tensor == 0 and position % session.layout.data == session.data:
            written.append(save_layer(folder, layer, tensors))
    return written


def _join_rows(block: torch.Tensor, session: Session) -> torch.Tensor:
    """The whole second moment [2,K,K] from each tensor rank's rows [2,K/T,K]."""
    count = session.layout.tensor
    if count == 1:
        return block
    blocks = [torch.empty_like(block) for _ in range(count)]
    dist.all_gather(blocks, block, group=session.tensor_group)
    return torch.cat(blocks, dim=1)
