"""Forward hooks on a rank's linears, and the sufficient statistics that they accumulate.

Every statistic is a maximum, or a sum of multiples of one unit, over micro-batches whose samples
are chosen by id. The result is therefore the same for any assignment of data and layers to ranks.
Each tensor rank has the whole input of every linear. It keeps the sketches of some linears, and
some strips of every second moment.

Legend: L layers of this rank, N input features of all its linears, S tokens, B samples, H hidden,
T = S B tokens of a micro-batch, K input features of one linear, m rows of a sketch, G blocks of g.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch.linalg import vector_norm

from nemo_vlm_ptq.calibrate.observe.batch_tokens import MODALITIES, BatchTokens
from nemo_vlm_ptq.calibrate.second_moments import accumulate_strip, zero_strip
from nemo_vlm_ptq.calibrate.sketch import accumulate_blocks, accumulate_sketch, zero_blocks
from nemo_vlm_ptq.calibrate.statistics import LINEARS, SUM_UNIT, layer_linears
from nemo_vlm_ptq.constants import SKETCH_ROWS
from nemo_vlm_ptq.distributed.moment_strips import strip_owner, strips
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import IMAGE, TEXT
from nemo_vlm_ptq.megatron.attention import core_attention
from nemo_vlm_ptq.megatron.forward import Batch
from nemo_vlm_ptq.megatron.parallel_context import ParallelContext
from nemo_vlm_ptq.utils.pinned_memory import start_copy_to_host, to_device

MODALITY_NAMES = {TEXT: "text", IMAGE: "image"}


def sketch_owner(linear: str, parallel: ParallelContext) -> int:
    """Return the tensor rank that has the sketches of a linear, in every layer."""
    return list(LINEARS).index(linear) % parallel.layout.tensor


class Observer:
    """Statistics of some of this rank's layers, accumulated by forward hooks.

    Attributes:
        layers: layer -> Megatron transformer layer.
        input_slices: (layer, linear) -> its input features in `amax` and `sum`.
        amax: [2,N] float32, largest |x|.
        sum: [2,N] int64, sum of |x| in units of SUM_UNIT.
        gathers_sketches: whether linears have sketches, here or on another tensor rank.
        sketches: (layer, linear) -> float64 [2m,K], of this rank's linears.
        blocks: (layer, linear) -> float64 [2,G,g,g], of this rank's linears.
        second_moments: (layer, linear) -> for each modality, this rank's strips by index.
        kv_amax: [L,2] float32, largest magnitudes of keys and of values.
        tokens: [L,2] int64, numbers of tokens of each modality.
    """

    def __init__(
        self,
        model: GPTModel | None,
        parallel: ParallelContext,
        layers: Sequence[int],
        moments: Collection[str] = (),
    ) -> None:
        self.gathers_sketches = "sketch" in moments
        self.parallel, self._decoder = parallel, None if model is None else model.decoder
        found = [] if model is None else model.decoder.layers
        blocks = {block.layer_number - 1: block for block in found}
        self.layers = {layer: blocks[layer] for layer in layers}
        self.input_slices: dict[tuple[int, str], slice] = {}
        self.sketches: dict[tuple[int, str], torch.Tensor] = {}
        self.blocks: dict[tuple[int, str], torch.Tensor] = {}
        self.second_moments: dict[tuple[int, str], list[dict[int, torch.Tensor]]] = {}
        end, device = 0, parallel.device
        for layer, block in self.layers.items():
            for name, module in layer_linears(block).items():
                width = module.weight.shape[1]
                self.input_slices[layer, name] = slice(end, end := end + width)
                if "sketch" in moments and sketch_owner(name, parallel) == parallel.tensor_rank:
                    shape = 2 * SKETCH_ROWS, width
                    self.sketches[layer, name] = torch.zeros(
                        shape, dtype=torch.float64, device=device
                    )
                    self.blocks[layer, name] = zero_blocks(width, device)
                if "whole" in moments:
                    self.second_moments[layer, name] = self._zero_strips(width)
        self.amax = torch.zeros(2, end, device=device)
        self.sum = torch.zeros(2, end, dtype=torch.int64, device=device)
        self.kv_amax = torch.zeros(len(layers), 2, device=device)
        self.tokens = torch.zeros(len(layers), 2, dtype=torch.int64, device=device)
        # State of the current micro-batch: amax and sum, its tokens, layers to update.
        self._batch_statistics = torch.zeros(2, 2, end, device=device)
        self._tokens: BatchTokens
        self._active_layers: Collection[int] = ()
        self._pending_check: Callable[[], None] = lambda: None  # of the previous micro-batch

    def linears(self, layer: int) -> list[str]:
        """Return the linears that a layer has."""
        return [name for name in LINEARS if (layer, name) in self.input_slices]

    def _zero_strips(self, width: int) -> list[dict[int, torch.Tensor]]:
        T, t = self.parallel.layout.tensor, self.parallel.tensor_rank
        owned = [i for i in range(len(strips(width))) if strip_owner(i, T) == t]
        return [{i: zero_strip(width, i, self.parallel.device) for i in owned} for _ in MODALITIES]

    @contextmanager
    def attach_hooks(self) -> Iterator[None]:
        """Attach the forward hooks inside the context."""
        handles = []
        if self._decoder is not None:
            handles.append(self._decoder.register_forward_hook(self._accumulate_batch))
        for index, (layer, block) in enumerate(self.layers.items()):
            for name, module in layer_linears(block).items():
                hook = self._make_input_hook(layer, name)
                handles.append(module.register_forward_pre_hook(hook))
            if (attention := core_attention(block)) is not None:
                attention.kv_observer = self._make_kv_hook(layer, self.kv_amax[index])
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for attention in map(core_attention, self.layers.values()):
                if attention is not None:
                    attention.kv_observer = None

    def start_micro_batch(self, tokens: BatchTokens, active_layers: Collection[int]) -> None:
        """Prepare for the forward pass of a micro-batch.

        Args:
            tokens: the micro-batch.
            active_layers: layers whose statistics do not include it yet; others ignore it.
        """
        self._tokens, self._active_layers = tokens, active_layers
        self._batch_statistics = torch.zeros_like(self._batch_statistics)
        active = torch.tensor([layer in active_layers for layer in self.layers], dtype=torch.int64)
        self.tokens += to_device(torch.outer(active, tokens.counts), self.tokens.device)

    def _accumulate_batch(self, _: Any, __: Any, out_SBH: torch.Tensor) -> None:
        """Add the micro-batch's maxima and sums, and check the previous micro-batch for NaN or Inf.

        Runs as forward hook of the decoder. The check of one micro-batch is deferred to the next,
        because waiting for its result would leave a GPU idle.

        Raises:
            UserError: an activation of the previous micro-batch contains NaN or Inf.
        """
        amax, total = self._batch_statistics
        torch.maximum(self.amax, amax, out=self.amax)
        self.sum += total.double().mul_(1 / SUM_UNIT).round_().long()
        # Only sums are checked: maxima ignore NaN.
        batch, is_finite = self._tokens.batch, start_copy_to_host(total.isfinite().all())
        self.raise_pending()

        def check() -> None:
            if not bool(is_finite()):
                self._raise_not_finite(batch, total, out_SBH)

        self._pending_check = check

    def release(self, layer: int, *, is_owner: bool, drop_moments: bool) -> None:
        """Release a layer after its reduction over data ranks.

        Args:
            layer: the layer.
            is_owner: whether this data rank has the sums of all; otherwise they start at zero.
            drop_moments: free sketches and second moments.
        """
        position = list(self.layers).index(layer)
        if not is_owner:
            self.tokens[position] = 0
            for name in self.linears(layer):
                self.sum[:, self.input_slices[layer, name]] = 0
        if drop_moments:
            for name in self.linears(layer):
                self.second_moments.pop((layer, name), None)
                self.sketches.pop((layer, name), None)
                self.blocks.pop((layer, name), None)

    def raise_pending(self) -> None:
        """Run the check that is still pending.

        Raises:
            UserError: an activation of the last micro-batch contains NaN or Inf.
        """
        check, self._pending_check = self._pending_check, lambda: None
        check()

    def _make_input_hook(self, layer: int, name: str) -> Any:
        """Return the forward pre-hook of one linear."""
        input_slice = self.input_slices[layer, name]
        second_moments = self.second_moments.get((layer, name), [{} for _ in MODALITIES])
        sketch, blocks = self.sketches.get((layer, name)), self.blocks.get((layer, name))

        def hook(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            if layer not in self._active_layers:
                return
            x_TK = args[0].detach().flatten(0, 1)
            self._observe_columns(x_TK, input_slice)
            if sketch is not None and self._tokens.rows is not None:
                accumulate_sketch(sketch, x_TK, self._tokens.rows)
            if blocks is not None:
                accumulate_blocks(blocks, x_TK, self._tokens.modality)
            for row, token_index in self._tokens.by_modality:
                if second_moments[row]:
                    modality_x_TK = x_TK[token_index]
                    for index, strip in second_moments[row].items():
                        accumulate_strip(strip, index, modality_x_TK)

        return hook

    def _observe_columns(self, x_TK: torch.Tensor, input_slice: slice) -> None:
        """Store maxima and sums of each input feature of a micro-batch, by modality."""
        amax, total = self._batch_statistics[..., input_slice]
        if x_TK.is_cuda:
            from nemo_vlm_ptq.calibrate import sum_kernels

            batch_amax, batch_sum = sum_kernels.column_statistics(x_TK, self._tokens.modality)
            amax.copy_(batch_amax)
            total.copy_(batch_sum)
            return
        for row, token_index in self._tokens.by_modality:
            modality_x_TK = x_TK[token_index]
            for order, out in ((torch.inf, amax), (1, total)):
                vector_norm(modality_x_TK, order, dim=0, dtype=torch.float32, out=out[row])

    def _make_kv_hook(self, layer: int, kv_amax: torch.Tensor) -> Any:
        """Return the observer of one layer's keys and values; it updates `kv_amax` [2] in place."""

        def hook(key: torch.Tensor, value: torch.Tensor) -> None:
            if layer not in self._active_layers:
                return
            for index, x in enumerate((key, value)):
                valid = x.flatten(0, 1)[self._tokens.valid]
                amax = vector_norm(valid, torch.inf, dtype=torch.float32)
                torch.maximum(kv_amax[index], amax, out=kv_amax[index])

        return hook

    def _raise_not_finite(self, batch: Batch, total: torch.Tensor, out_SBH: torch.Tensor) -> None:
        """Raise an error that names the first linear, in forward order, with NaN or Inf inputs."""
        valid = (batch.modality != 0).to(out_SBH.device)
        affected = (~out_SBH.isfinite().all(dim=2).T & valid).any(dim=1).nonzero().flatten()
        sample_id = batch.sample_ids[int(affected[0]) if len(affected) else 0]
        for (layer, name), input_slice in self.input_slices.items():
            affected_rows = (~total[:, input_slice].isfinite().all(dim=1)).tolist()
            if any(affected_rows):
                names = [
                    MODALITY_NAMES[modality]
                    for modality, is_affected in zip(MODALITIES, affected_rows, strict=True)
                    if is_affected
                ]
                raise UserError(
                    f"activation holds NaN or Inf: layer {layer}, input of {name}, "
                    f"{' and '.join(names)} tokens of sample {sample_id}"
                )
