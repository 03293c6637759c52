"""Observe: run the model over calibration data and keep sufficient statistics, no more.

Every statistic is a maximum or a sum of integers over micro-batches, and micro-batches are formed
by sample ids, so the result does not depend on how data or layers are spread over ranks. Under
tensor parallelism the input of a row-parallel linear is gathered for its second moment, and each
rank keeps some strips of every moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch.linalg import vector_norm

from nemo_vlm_ptq.calibrate.moments import add, empty
from nemo_vlm_ptq.calibrate.statistics import LINEARS, ROW_PARALLEL, UNIT
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import IMAGE, TEXT, Sample
from nemo_vlm_ptq.megatron.forward import Batch, collate, encode_images, forward
from nemo_vlm_ptq.megatron.session import Session
from nemo_vlm_ptq.parallel import strip_owner, strips
from nemo_vlm_ptq.progress import progress_bar

Chunk = Sequence[Any]  # the questions of one micro-batch
MODALITIES = (TEXT, IMAGE)
MODALITY_NAMES = {TEXT: "text", IMAGE: "image"}


class Observer:
    """Hooks on the linears of some of this rank's layers, and what they have seen.

    `amax` float32 and `sum` int64 are [2, N]: all inputs of all linears on this rank, side by side;
    `places` says which are whose. `moments` holds this rank's strips, [modality][strip].
    """

    def __init__(
        self, model: GPTModel, session: Session, layers: Sequence[int], moments: bool
    ) -> None:
        self.session, self._decoder = session, model.decoder
        blocks = {block.layer_number - 1: block for block in model.decoder.layers}
        self.blocks = {layer: blocks[layer] for layer in layers}
        self.places: dict[tuple[int, str], slice] = {}
        self.moments: dict[tuple[int, str], list[dict[int, torch.Tensor]]] = {}
        end, device = 0, session.device
        for layer, block in self.blocks.items():
            for name, path in LINEARS.items():
                width = block.get_submodule(path).weight.shape[1]
                self.places[layer, name] = slice(end, end := end + width)
                if moments:
                    self.moments[layer, name] = self._strips(self.full_width(name, width))
        self.amax = torch.zeros(2, end, device=device)
        self.sum = torch.zeros(2, end, dtype=torch.int64, device=device)
        self.attention = torch.zeros(len(layers), 2, device=device)
        self.tokens = dict.fromkeys(MODALITIES, 0)
        self._seen = torch.zeros(2, 2, end, device=device)  # amax and sum of one micro-batch
        self._picks: list[tuple[int, torch.Tensor]] = []  # (row of modality, its tokens)
        self._batch: Batch | None = None

    def full_width(self, name: str, width: int) -> int:
        """Inputs of the whole linear."""
        return width * self.session.layout.tensor if name in ROW_PARALLEL else width

    def _strips(self, width: int) -> list[dict[int, torch.Tensor]]:
        T, t = self.session.layout.tensor, self.session.tensor
        own = [i for i in range(len(strips(width))) if strip_owner(i, T) == t]
        return [{i: empty(width, i, self.session.device) for i in own} for _ in MODALITIES]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are in place inside this block."""
        handles = [self._decoder.register_forward_hook(self._take_in)]
        for index, (layer, block) in enumerate(self.blocks.items()):
            for name, path in LINEARS.items():
                hook = self._hook(layer, name)
                handles.append(block.get_submodule(path).register_forward_pre_hook(hook))
            block.self_attention.core_attention.watch = self._watch(self.attention[index])
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block in self.blocks.values():
                block.self_attention.core_attention.watch = None

    def expect(self, batch: Batch) -> None:
        """The next forward is of this micro-batch."""
        kinds = batch.modality.T.flatten()  # in the order of tokens in [S,B]
        self._batch, self._picks = batch, []
        self._seen.zero_()
        for index, modality in enumerate(MODALITIES):
            pick = (kinds == modality).nonzero().flatten()
            self.tokens[modality] += len(pick)
            if len(pick):
                self._picks.append((index, pick.to(self.session.device)))

    def _take_in(self, _: Any, __: Any, out_SBH: torch.Tensor) -> None:
        """What a micro-batch showed, once it has left this rank's layers and before it is sent on.

        Raises:
            UserError: NaN or Inf in an activation.
        """
        amax, total = self._seen
        if not bool(amax.isfinite().all()):
            self._refuse(amax, out_SBH)
        torch.maximum(self.amax, amax, out=self.amax)
        self.sum += total.double().mul_(1 / UNIT).round_().long()

    def _hook(self, layer: int, name: str) -> Any:
        place, kept = self.places[layer, name], self.moments.get((layer, name))

        def hook(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            x_TK = args[0].detach().flatten(0, 1)
            for modality, pick in self._picks:
                own = x_TK.index_select(0, pick)
                for norm, seen in zip((torch.inf, 1), self._seen, strict=True):
                    out = seen[modality, place]
                    vector_norm(own, norm, dim=0, dtype=torch.float32, out=out)
                if kept is not None:
                    full = self._gather(own) if name in ROW_PARALLEL else own
                    for index, moment in kept[modality].items():
                        add(moment, index, full)

        return hook

    def _gather(self, x_TK: torch.Tensor) -> torch.Tensor:
        count = self.session.layout.tensor
        if count == 1:
            return x_TK
        shards = [torch.empty_like(x_TK) for _ in range(count)]
        dist.all_gather(shards, x_TK, group=self.session.tensor_group)
        return torch.cat(shards, dim=1)

    def _watch(self, seen: torch.Tensor) -> Any:
        def watch(key: torch.Tensor, value: torch.Tensor) -> None:
            real = torch.cat([pick for _, pick in self._picks])
            for index, x in enumerate((key, value)):
                own = x.flatten(0, 1).index_select(0, real)
                amax = vector_norm(own, torch.inf, dtype=torch.float32)
                torch.maximum(seen[index], amax, out=seen[index])

        return watch

    def _refuse(self, amax: torch.Tensor, out_SBH: torch.Tensor) -> None:
        """Name the first linear, in the order of the forward, that saw NaN or Inf."""
        assert self._batch is not None
        real = (self._batch.modality != 0).to(out_SBH.device)
        samples = (~out_SBH.isfinite().all(dim=2).T & real).any(dim=1).nonzero().flatten()
        sample = self._batch.ids[int(samples[0]) if len(samples) else 0]
        for (layer, name), place in self.places.items():
            bad = ~amax[:, place].isfinite().all(dim=1)
            if bool(bad.any()):
                kinds = [MODALITY_NAMES[m] for m, one in zip(MODALITIES, bad, strict=True) if one]
                raise UserError(
                    f"activation holds NaN or Inf: layer {layer}, input of {name}, "
                    f"{' and '.join(kinds)} tokens of sample {sample}"
                )


def observe(
    model: GPTModel,
    vision: Any,
    session: Session,
    chunks: Sequence[Chunk],
    prepare: Callable[[Chunk], list[Sample]],
    layers: Sequence[int],
    *,
    moments: bool,
) -> Observer:
    """Run micro-batches through the model and collect statistics of some layers.

    Args:
        model: this rank's part of the decoder.
        vision: pixels -> features; used on the first pipeline stage.
        session: this rank's place.
        chunks: this data rank's micro-batches, not prepared yet.
        prepare: makes the samples of a micro-batch, when their turn comes.
        layers: those of this rank's layers that are observed, counted over the whole model.
        moments: second moments are wanted.

    Raises:
        UserError: NaN or Inf in an activation; names layer, linear, modality and sample.
    """
    observer = Observer(model, session, layers, moments)
    window = 8 * session.layout.tensor  # micro-batches whose images are looked at together
    with observer.watching(), progress_bar("observe", "batch", session.rank, len(chunks)) as bar:
        for start in range(0, len(chunks), window):
            batches = [prepare(chunk) for chunk in chunks[start : start + window]]
            flat = [sample for batch in batches for sample in batch]
            features = iter(encode_images(vision, session, flat, model.config.hidden_size))
            for samples in batches:
                batch = collate(samples)
                observer.expect(batch)
                forward(model, session, batch, [next(features) for _ in samples])
                bar.update()
    return observer
