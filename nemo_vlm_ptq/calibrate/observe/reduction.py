"""Reduce the statistics of all ranks and write each layer once; load saved sums to resume.

Layers are partitioned over data ranks, and the layers of a data rank over its tensor ranks, so that
all ranks write at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from nemo_vlm_ptq.calibrate.observe.observer import Observer, sketch_owner
from nemo_vlm_ptq.calibrate.observe.progress import SavedSums
from nemo_vlm_ptq.calibrate.second_moments import MOMENT_LIMIT, MOMENT_UNIT, strip_to_float32
from nemo_vlm_ptq.calibrate.sketch import SKETCH_LIMIT, SKETCH_UNIT, block_features
from nemo_vlm_ptq.calibrate.statistics import (
    IN_ALL_LAYERS,
    SUM_UNIT,
    layer_file,
    save_layer,
)
from nemo_vlm_ptq.constants import SKETCH_ROWS
from nemo_vlm_ptq.distributed.moment_strips import strip_numel, strip_owner, strips
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.megatron.parallel_context import ParallelContext, free_memory
from nemo_vlm_ptq.workdir.checked_files import checked_file

WRITER_THREADS = 8
LayerConsumer = Callable[[int, Mapping[str, torch.Tensor]], None]  # layer, tensors of its file


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """What a rank has after a reduction.

    sha256: file name -> sha256 of the files that this rank wrote.
    tokens: numbers of text and image tokens; empty on a rank without layers.
    """

    sha256: dict[str, str]
    tokens: list[int]


def reduce_layers(
    observer: Observer,
    parallel: ParallelContext,
    folder: Path | None,
    *,
    exact: bool,
    consume: LayerConsumer = lambda layer, tensors: None,
) -> Reduced:
    """Reduce the statistics over ranks; write and hand on each layer once (collective).

    Afterwards the data rank that owns a layer holds its sums, and the other data ranks hold zeros,
    so that the observer can continue.

    Args:
        observer: statistics of this rank.
        parallel: this rank's parallel context.
        folder: where to write; None: nothing is written.
        exact: write second moments in float64 multiples of MOMENT_UNIT, to resume from; otherwise
            as float32, to solve from, which uses the observer up.
        consume: called on the writing rank with each layer and its tensors, while files are
            written.

    Raises:
        UserError: an activation holds NaN or Inf, or activations are too large for exact sums of
            second moments.
    """
    observer.raise_pending()
    _all_reduce(observer, parallel)
    tokens = observer.tokens[0].tolist() if len(observer.tokens) else []
    files: list[Future[tuple[str, str]]] = []
    unconsumed: list[tuple[int, Mapping[str, torch.Tensor]]] = []
    with ThreadPoolExecutor(WRITER_THREADS) as writers:
        for position, layer in enumerate(observer.layers):
            owner, writes = _owner_data_rank(layer, parallel), _is_writer(layer, parallel)
            if writes and len(files) >= (limit := _max_pending_files(observer, exact)):
                files[-limit].result()
            tensors = _reduce_layer(observer, layer, parallel, exact)
            if writes:
                key, value = observer.kv_amax[position].split(1)
                tensors |= {"key.amax": key, "value.amax": value}
                names = observer.linears(layer)
                tensors |= {f"{name}.tokens": observer.tokens[position] for name in names}
                if folder is not None:
                    files.append(writers.submit(save_layer, folder, layer, tensors))
                unconsumed.append((layer, tensors))
            observer.release(layer, is_owner=owner == parallel.data_rank, drop_moments=not exact)
            if owner == parallel.layout.data - 1 or position == len(observer.layers) - 1:
                while unconsumed:  # once every data rank has a layer, so that all work in parallel
                    consume(*unconsumed.pop())
    return Reduced(sha256=dict(file.result() for file in files), tokens=tokens)


def _all_reduce(observer: Observer, parallel: ParallelContext) -> None:
    """Reduce everything but the second moments, in place."""
    dist.all_reduce(observer.amax, dist.ReduceOp.MAX, group=parallel.data_group)
    dist.all_reduce(observer.sum, group=parallel.data_group)
    dist.all_reduce(observer.tokens, group=parallel.data_group)
    for group in (parallel.data_group, parallel.tensor_group):
        dist.all_reduce(observer.kv_amax, dist.ReduceOp.MAX, group=group)


def _max_pending_files(observer: Observer, exact: bool) -> int:
    """Return how many layers may wait to be written: as many as half of the free memory holds."""
    layer = next(iter(observer.layers))
    slices = [observer.input_slices[layer, name] for name in observer.linears(layer)]
    widths = [inputs.stop - inputs.start for inputs in slices]
    numel = 1
    if observer.gathers_sketches:
        numel += sum(2 * width * (SKETCH_ROWS + block_features(width)) for width in widths)
    if observer.second_moments:
        numel += sum(2 * strip_numel(width, 0, 1) for width in widths)
    fitting = free_memory(observer.parallel.device) // 2 // ((8 if exact else 4) * numel)
    return min(WRITER_THREADS, max(1, fitting))


def _owner_data_rank(layer: int, parallel: ParallelContext) -> int:
    """Return the data rank that ends up with the sums of a layer."""
    return layer % parallel.layout.data


def _is_writer(layer: int, parallel: ParallelContext) -> bool:
    """Return whether this rank writes a layer."""
    writer = layer // parallel.layout.data % parallel.layout.tensor
    owner = _owner_data_rank(layer, parallel)
    return owner == parallel.data_rank and writer == parallel.tensor_rank


def _reduce_layer(
    observer: Observer, layer: int, parallel: ParallelContext, exact: bool
) -> dict[str, torch.Tensor]:
    """Return a layer's reduced tensors (collective); second moments on the writing rank only."""
    owner, writes = _owner_data_rank(layer, parallel), _is_writer(layer, parallel)
    tensors: dict[str, torch.Tensor] = {}
    for name in observer.linears(layer):
        input_slice = observer.input_slices[layer, name]
        amax, total = observer.amax[:, input_slice], observer.sum[:, input_slice]
        tensors |= {f"{name}.amax": amax, f"{name}.sum": total}
        if not (observer.gathers_sketches or (layer, name) in observer.second_moments):
            continue
        bound = float((amax.double() * total).max() * SUM_UNIT)  # of every second moment
        largest_sum = float(total.max()) * SUM_UNIT  # of a row of a sketch, at most
        if bound >= MOMENT_LIMIT or largest_sum >= SKETCH_LIMIT:
            raise UserError(
                f"layer {layer}, input of {name}: activations are too large for exact sums of "
                f"second moments: largest {float(amax.max()):.2g}, second moments up to "
                f"{bound:.2g}, must be below {MOMENT_LIMIT:.2g}"
            )
        found = _reduce_sketch(observer, (layer, name), parallel, owner, exact)
        if (layer, name) in observer.second_moments:
            found = chain(found, _reduce_strips(observer, (layer, name), parallel, owner, exact))
        for key, tensor in found:
            if writes:
                tensors[key] = tensor  # copied to the host by the thread that writes it
    return tensors


def _reduce_sketch(
    observer: Observer, linear: tuple[int, str], parallel: ParallelContext, owner: int, exact: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield sketch [2,m,K] and blocks [2,G,g,g] of a linear, if they are gathered (collective).

    They are complete on all tensor ranks of the data rank `owner`.
    """
    if not observer.gathers_sketches:
        return
    data_ranks = dist.get_process_group_ranks(parallel.data_group)
    tensor_ranks = dist.get_process_group_ranks(parallel.tensor_group)
    input_slice, (_, name) = observer.input_slices[linear], linear
    width = input_slice.stop - input_slice.start
    g, dtype = block_features(width), torch.float64 if exact else torch.float32
    source = sketch_owner(name, parallel)
    parts = (
        ("sketch", observer.sketches, (2, SKETCH_ROWS, width), SKETCH_UNIT),
        ("blocks", observer.blocks, (2, width // g, g, g), MOMENT_UNIT),
    )
    for key, sums_by_linear, shape, unit in parts:
        result = torch.empty(shape, dtype=dtype, device=parallel.device)
        if parallel.tensor_rank == source:
            sums = sums_by_linear[linear]
            dist.reduce(sums, data_ranks[owner], group=parallel.data_group)
            if parallel.data_rank == owner:
                result.copy_((sums if exact else sums * unit).view(shape))
            else:
                sums.zero_()
        if parallel.layout.tensor > 1 and parallel.data_rank == owner:
            dist.broadcast(result, tensor_ranks[source], group=parallel.tensor_group)
        yield f"{name}.{key}", result


def _reduce_strips(
    observer: Observer, linear: tuple[int, str], parallel: ParallelContext, owner: int, exact: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (key, strip [2,b,K-i b]) of every strip (collective).

    Strips are complete on all tensor ranks of the data rank `owner`.
    """
    T, owned_strips = parallel.layout.tensor, observer.second_moments[linear]
    data_ranks = dist.get_process_group_ranks(parallel.data_group)
    tensor_ranks = dist.get_process_group_ranks(parallel.tensor_group)
    input_slice, (_, name) = observer.input_slices[linear], linear
    width = input_slice.stop - input_slice.start
    dtype = torch.float64 if exact else torch.float32
    for index, rows in enumerate(strips(width)):
        source, shape = strip_owner(index, T), (2, rows.stop - rows.start, width - rows.start)
        result = torch.empty(shape, dtype=dtype, device=parallel.device)
        if parallel.tensor_rank == source:
            for row, modality_strips in enumerate(owned_strips):
                strip = modality_strips[index]
                dist.reduce(strip, data_ranks[owner], group=parallel.data_group)
                if parallel.data_rank == owner:
                    result[row] = strip if exact else strip_to_float32(strip)
                else:
                    strip.zero_()
        if T > 1 and parallel.data_rank == owner:
            dist.broadcast(result, tensor_ranks[source], group=parallel.tensor_group)
        yield f"{name}.moment.{index}", result


def load_saved_sums(observer: Observer, folder: Path, saved: Mapping[int, SavedSums]) -> None:
    """Load saved sums into the observer, on the data rank that owns each layer."""
    parallel = observer.parallel
    for position, layer in enumerate(observer.layers):
        if layer not in saved or _owner_data_rank(layer, parallel) != parallel.data_rank:
            continue
        path = checked_file(folder, f"{saved[layer].folder}/{layer_file(layer)}")
        with safe_open(path, framework="pt", device=str(parallel.device)) as file:
            for name in observer.linears(layer):
                input_slice = observer.input_slices[layer, name]
                observer.amax[:, input_slice] = file.get_tensor(f"{name}.amax")
                observer.sum[:, input_slice] = file.get_tensor(f"{name}.sum")
                for row, modality_strips in enumerate(
                    observer.second_moments.get((layer, name), ())
                ):
                    for index, strip in modality_strips.items():
                        strip.copy_(file.get_slice(f"{name}.moment.{index}")[row])
                for key, sums in (("sketch", observer.sketches), ("blocks", observer.blocks)):
                    if (layer, name) in sums:
                        stored = file.get_tensor(f"{name}.{key}")
                        sums[layer, name].copy_(stored.view(sums[layer, name].shape))
            kv_amax = [file.get_tensor(f"{name}.amax") for name in ("key", "value")]
            observer.kv_amax[position] = torch.cat(kv_amax)
            observer.tokens[position] = file.get_tensor(f"{IN_ALL_LAYERS}.tokens")
