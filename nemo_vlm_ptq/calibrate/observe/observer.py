"""Hooks on the linears of some layers, and the sufficient statistics they have gathered.

Every statistic is a maximum or a sum of multiples of one unit over micro-batches, and micro-batches
are formed by sample ids, so the result does not depend on how data or layers are spread over
ranks. Tensor ranks see whole inputs of every linear, and each keeps some strips of every second
moment.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch.linalg import vector_norm

from nemo_vlm_ptq.calibrate.second_moments import accumulate, zeros
from nemo_vlm_ptq.calibrate.statistics import LINEARS, UNIT
from nemo_vlm_ptq.distributed.layout import strip_owner, strips
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import IMAGE, TEXT
from nemo_vlm_ptq.megatron.forward import Batch
from nemo_vlm_ptq.megatron.parallel_context import ParallelContext
from nemo_vlm_ptq.utils.pinned_memory import start_copy_to_host, to_device

MODALITIES = (TEXT, IMAGE)
MODALITY_NAMES = {TEXT: "text", IMAGE: "image"}


class Observer:
    """Watches some of this rank's layers.

    `amax` float32 and `sum` int64 are [2, N]: all inputs of all linears on this rank, side by side;
    `places` says which are whose. `moments` holds this rank's strips, [modality][strip].
    `attention` [L,2] has the maxima of K and V, `tokens` [L,2] int64 the tokens of each modality.
    """

    def __init__(
        self, model: GPTModel, parallel: ParallelContext, layers: Sequence[int], moments: bool
    ) -> None:
        self.parallel, self._decoder = parallel, model.decoder
        blocks = {block.layer_number - 1: block for block in model.decoder.layers}
        self.blocks = {layer: blocks[layer] for layer in layers}
        self.input_slices: dict[tuple[int, str], slice] = {}
        self.moments: dict[tuple[int, str], list[dict[int, torch.Tensor]]] = {}
        end, device = 0, parallel.device
        for layer, block in self.blocks.items():
            for name, path in LINEARS.items():
                width = block.get_submodule(path).weight.shape[1]
                self.input_slices[layer, name] = slice(end, end := end + width)
                if moments:
                    self.moments[layer, name] = self._strips(width)
        self.amax = torch.zeros(2, end, device=device)
        self.sum = torch.zeros(2, end, dtype=torch.int64, device=device)
        self.attention = torch.zeros(len(layers), 2, device=device)
        self.tokens = torch.zeros(len(layers), 2, dtype=torch.int64, device=device)
        self._seen = torch.zeros(2, 2, end, device=device)  # amax and sum of one micro-batch
        self._picks: list[tuple[int, torch.Tensor | slice]] = []  # (row of modality, its tokens)
        self._kinds = torch.empty(0, dtype=torch.int8)  # of the micro-batch's tokens
        self._real: torch.Tensor | slice = slice(None)
        self._batch: Batch
        self._wanted: Collection[int] = ()
        self._unread: Callable[[], None] = lambda: None  # what refuses the last micro-batch

    def _strips(self, width: int) -> list[dict[int, torch.Tensor]]:
        T, t = self.parallel.layout.tensor, self.parallel.tensor
        own = [i for i in range(len(strips(width))) if strip_owner(i, T) == t]
        return [{i: zeros(width, i, self.parallel.device) for i in own} for _ in MODALITIES]

    @contextmanager
    def attach_hooks(self) -> Iterator[None]:
        """Hooks are in place inside this block."""
        handles = [self._decoder.register_forward_hook(self._take_in)]
        for index, (layer, block) in enumerate(self.blocks.items()):
            for name, path in LINEARS.items():
                hook = self._hook(layer, name)
                handles.append(block.get_submodule(path).register_forward_pre_hook(hook))
            block.self_attention.core_attention.kv_observer = self._watch(
                layer, self.attention[index]
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block in self.blocks.values():
                block.self_attention.core_attention.kv_observer = None

    def start_micro_batch(self, batch: Batch, wanted: Collection[int]) -> None:
        """The next forward is of this micro-batch, and these layers do not contain it yet."""
        kinds = batch.modality.T.flatten()  # in the order of tokens in [S,B]
        self._batch, self._picks, self._wanted = batch, [], wanted
        self._kinds = to_device(kinds, self.parallel.device)
        self._real = self._places_of(kinds != 0)
        self._seen = torch.zeros_like(self._seen)
        counts = []
        for index, modality in enumerate(MODALITIES):
            mask = kinds == modality
            counts.append(int(mask.sum()))
            if counts[-1]:
                self._picks.append((index, self._places_of(mask)))
        rows = torch.tensor([layer in wanted for layer in self.blocks], dtype=torch.int64)
        self.tokens += to_device(torch.outer(rows, torch.tensor(counts)), self.tokens.device)

    def _places_of(self, mask: torch.Tensor) -> torch.Tensor | slice:
        if bool(mask.all()):
            return slice(None)  # nothing has to be copied
        return to_device(mask.nonzero().flatten(), self.parallel.device)

    def _take_in(self, _: Any, __: Any, out_SBH: torch.Tensor) -> None:
        """What a micro-batch showed, once it has left this rank's layers and before it is sent on.

        What it found is asked for when the next one comes here: meanwhile a GPU has work, which
        waiting for it would take away.

        Raises:
            UserError: NaN or Inf in an activation.
        """
        amax, total = self._seen
        torch.maximum(self.amax, amax, out=self.amax)
        self.sum += total.double().mul_(1 / UNIT).round_().long()
        batch, finite = (
            self._batch,
            start_copy_to_host(total.isfinite().all()),
        )  # maxima pass over NaN
        self.raise_pending()

        def refuse() -> None:
            if not bool(finite()):
                self._refuse(batch, total, out_SBH)

        self._unread = refuse

    def raise_pending(self) -> None:
        """Nothing is left to be asked of micro-batches that ran.

        Raises:
            UserError: NaN or Inf in an activation of the last one.
        """
        refuse, self._unread = self._unread, lambda: None
        refuse()

    def _hook(self, layer: int, name: str) -> Any:
        place, kept = self.input_slices[layer, name], self.moments.get((layer, name))

        def hook(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            if layer not in self._wanted:
                return
            x_TK = args[0].detach().flatten(0, 1)
            self._see(x_TK, place)
            if kept is None:
                return
            for modality, pick in self._picks:
                own = x_TK[pick]
                for index, moment in kept[modality].items():
                    accumulate(moment, index, own)

        return hook

    def _see(self, x_TK: torch.Tensor, place: slice) -> None:
        """Maxima and sums of a micro-batch, by kind of token."""
        amax, total = self._seen[..., place]
        if x_TK.is_cuda:
            from nemo_vlm_ptq.calibrate import kernels

            for seen, found in zip(
                (amax, total), kernels.column_statistics(x_TK, self._kinds), strict=True
            ):
                seen.copy_(found)
            return
        for modality, pick in self._picks:
            own = x_TK[pick]
            for norm, seen in ((torch.inf, amax), (1, total)):
                vector_norm(own, norm, dim=0, dtype=torch.float32, out=seen[modality])

    def _watch(self, layer: int, seen: torch.Tensor) -> Any:
        def watch(key: torch.Tensor, value: torch.Tensor) -> None:
            if layer not in self._wanted:
                return
            for index, x in enumerate((key, value)):
                own = x.flatten(0, 1)[self._real]
                amax = vector_norm(own, torch.inf, dtype=torch.float32)
                torch.maximum(seen[index], amax, out=seen[index])

        return watch

    def _refuse(self, batch: Batch, total: torch.Tensor, out_SBH: torch.Tensor) -> None:
        """Name the first linear, in the order of the forward, that saw NaN or Inf."""
        real = (batch.modality != 0).to(out_SBH.device)
        samples = (~out_SBH.isfinite().all(dim=2).T & real).any(dim=1).nonzero().flatten()
        sample = batch.ids[int(samples[0]) if len(samples) else 0]
        for (layer, name), place in self.input_slices.items():
            bad = ~total[:, place].isfinite().all(dim=1)
            if bool(bad.any()):
                kinds = [MODALITY_NAMES[m] for m, one in zip(MODALITIES, bad, strict=True) if one]
                raise UserError(
                    f"activation holds NaN or Inf: layer {layer}, input of {name}, "
                    f"{' and '.join(kinds)} tokens of sample {sample}"
                )
