"""Reduce the statistics of all ranks and write each layer once; load saved sums to resume.

Layers are partitioned over data ranks, and the layers of a data rank over its tensor ranks, so that
all ranks write at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from nemo_vlm_ptq.calibrate.observe.observer import Observer
from nemo_vlm_ptq.calibrate.observe.progress import SavedSums
from nemo_vlm_ptq.calibrate.second_moments import MOMENT_LIMIT, strip_to_float32
from nemo_vlm_ptq.calibrate.statistics import LINEARS, SUM_UNIT, layer_file, save_layer
from nemo_vlm_ptq.distributed.moment_strips import strip_numel, strip_owner, strips
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.megatron.parallel_context import ParallelContext, free_memory

WRITER_THREADS = 8
LayerConsumer = Callable[[int, Mapping[str, torch.Tensor]], None]  # layer, tensors of its file


def reduce_and_save(
    observer: Observer,
    parallel: ParallelContext,
    folder: Path,
    *,
    exact: bool,
    consume: LayerConsumer = lambda layer, tensors: None,
) -> dict[str, str]:
    """Reduce the statistics over ranks and write each layer once (collective).

    Afterwards the data rank that owns a layer holds its sums, and the other data ranks hold zeros,
    so that the observer can continue.

    Args:
        observer: statistics of this rank.
        parallel: this rank's parallel context.
        folder: where to write.
        exact: write second moments in float64 multiples of MOMENT_UNIT, to resume from; otherwise
            as float32, to solve from, which uses the observer up.
        consume: called on the writing rank with each layer and its tensors, while files are
            written.

    Returns:
        File name -> sha256 of the files that this rank wrote.

    Raises:
        UserError: an activation holds NaN or Inf, or activations are too large for exact sums of
            second moments.
    """
    observer.raise_pending()
    _all_reduce(observer, parallel)
    files: list[Future[tuple[str, str]]] = []
    unconsumed: list[tuple[int, Mapping[str, torch.Tensor]]] = []
    with ThreadPoolExecutor(WRITER_THREADS) as writers:
        for position, layer in enumerate(observer.blocks):
            owner, writes = _owner_data_rank(position, parallel), _is_writer(position, parallel)
            if writes and len(files) >= (limit := _max_pending_files(observer, layer, exact)):
                files[-limit].result()
            tensors = _reduce_layer(observer, layer, parallel, exact)
            if writes:
                key, value = observer.kv_amax[position].split(1)
                tensors |= {"key.amax": key, "value.amax": value}
                tensors |= {f"{name}.tokens": observer.tokens[position] for name in LINEARS}
                files.append(writers.submit(save_layer, folder, layer, tensors))
                unconsumed.append((layer, tensors))
            if owner != parallel.data_rank:
                observer.tokens[position] = 0
                for name in LINEARS:
                    observer.sum[:, observer.input_slices[layer, name]] = 0
            for name in () if exact else LINEARS:
                observer.second_moments.pop((layer, name), None)
            if owner == parallel.layout.data - 1 or position == len(observer.blocks) - 1:
                while unconsumed:  # once every data rank has a layer, so that all work in parallel
                    consume(*unconsumed.pop())
    return dict(file.result() for file in files)


def _all_reduce(observer: Observer, parallel: ParallelContext) -> None:
    """Reduce everything but the second moments, in place."""
    dist.all_reduce(observer.amax, dist.ReduceOp.MAX, group=parallel.data_group)
    dist.all_reduce(observer.sum, group=parallel.data_group)
    dist.all_reduce(observer.tokens, group=parallel.data_group)
    for group in (parallel.data_group, parallel.tensor_group):
        dist.all_reduce(observer.kv_amax, dist.ReduceOp.MAX, group=group)


def _max_pending_files(observer: Observer, layer: int, exact: bool) -> int:
    """Return how many layers may wait to be written: as many as half of the free memory holds."""
    if (layer, next(iter(LINEARS))) not in observer.second_moments:
        return WRITER_THREADS
    slices = [observer.input_slices[layer, name] for name in LINEARS]
    numel = sum(2 * strip_numel(inputs.stop - inputs.start, 0, 1) for inputs in slices)
    fitting = free_memory(observer.parallel.device) // 2 // ((8 if exact else 4) * numel)
    return min(WRITER_THREADS, max(1, fitting))


def _owner_data_rank(position: int, parallel: ParallelContext) -> int:
    """Return the data rank that ends up with the sums of the layer at `position`."""
    return position % parallel.layout.data


def _is_writer(position: int, parallel: ParallelContext) -> bool:
    """Return whether this rank writes the layer at `position`."""
    writer = position // parallel.layout.data % parallel.layout.tensor
    owner = _owner_data_rank(position, parallel)
    return owner == parallel.data_rank and writer == parallel.tensor_rank


def _reduce_layer(
    observer: Observer, layer: int, parallel: ParallelContext, exact: bool
) -> dict[str, torch.Tensor]:
    """Return a layer's reduced tensors (collective); second moments on the writing rank only."""
    position = list(observer.blocks).index(layer)
    owner, writes = _owner_data_rank(position, parallel), _is_writer(position, parallel)
    tensors: dict[str, torch.Tensor] = {}
    for name in LINEARS:
        input_slice = observer.input_slices[layer, name]
        amax, total = observer.amax[:, input_slice], observer.sum[:, input_slice]
        tensors |= {f"{name}.amax": amax, f"{name}.sum": total}
        if (layer, name) not in observer.second_moments:
            continue
        bound = float((amax.double() * total).max() * SUM_UNIT)  # of every second moment
        if bound >= MOMENT_LIMIT:
            raise UserError(
                f"layer {layer}, input of {name}: activations are too large for exact sums of "
                f"second moments: largest {float(amax.max()):.2g}, second moments up to "
                f"{bound:.2g}, must be below {MOMENT_LIMIT:.2g}"
            )
        for key, strip in _reduce_strips(observer, (layer, name), parallel, owner, exact):
            if writes:
                tensors[key] = strip  # copied to the host by the thread that writes it
    return tensors


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
    for position, layer in enumerate(observer.blocks):
        if layer not in saved or _owner_data_rank(position, parallel) != parallel.data_rank:
            continue
        path = folder / saved[layer].folder / layer_file(layer)
        with safe_open(path, framework="pt", device=str(parallel.device)) as file:
            for name in LINEARS:
                input_slice = observer.input_slices[layer, name]
                observer.amax[:, input_slice] = file.get_tensor(f"{name}.amax")
                observer.sum[:, input_slice] = file.get_tensor(f"{name}.sum")
                for row, modality_strips in enumerate(
                    observer.second_moments.get((layer, name), ())
                ):
                    for index, strip in modality_strips.items():
                        strip.copy_(file.get_slice(f"{name}.moment.{index}")[row])
            kv_amax = [file.get_tensor(f"{name}.amax") for name in ("key", "value")]
            observer.kv_amax[position] = torch.cat(kv_amax)
            observer.tokens[position] = file.get_tensor("linear_qkv.tokens")
