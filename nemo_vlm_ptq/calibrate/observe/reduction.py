"""What ranks have observed, put together and written; and exact sums read back to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from nemo_vlm_ptq.calibrate import second_moments as moments
from nemo_vlm_ptq.calibrate.observe.observer import Observer
from nemo_vlm_ptq.calibrate.observe.progress import SavedSums
from nemo_vlm_ptq.calibrate.statistics import LINEARS, UNIT, layer_file, save_layer
from nemo_vlm_ptq.distributed.layout import strip_entries, strip_owner, strips
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.megatron.parallel_context import ParallelContext, free_memory

WRITER_THREADS = 8  # files at a time
LayerConsumer = Callable[[int, Mapping[str, torch.Tensor]], None]


def reduce_and_save(
    observer: Observer,
    parallel: ParallelContext,
    folder: Path,
    *,
    exact: bool,
    consume: LayerConsumer = lambda layer, tensors: None,
) -> dict[str, str]:
    """Put the ranks' statistics together and write each layer once (collective).

    Layers are dealt over the data ranks, and each one's over its tensor ranks, which write them.
    Afterwards a layer's sums are on the data rank that wrote it, and the others begin again from
    nothing.

    Args:
        observer: what this rank has seen.
        session: its place.
        folder: where files go.
        exact: second moments as they are summed, to go on from; else as float32, to solve from,
            and the observer is used up.
        consume: called with each layer and its tensors where they are written, meanwhile.

    Returns:
        sha256 of the files that this rank wrote, by name.

    Raises:
        UserError: NaN or Inf in an activation, or activations too large for exact sums of second
            moments.
    """
    observer.raise_pending()
    dist.all_reduce(observer.amax, dist.ReduceOp.MAX, group=parallel.data_group)
    dist.all_reduce(observer.sum, group=parallel.data_group)
    dist.all_reduce(observer.tokens, group=parallel.data_group)
    for group in (parallel.data_group, parallel.tensor_group):
        dist.all_reduce(observer.attention, dist.ReduceOp.MAX, group=group)
    written: list[Future[tuple[str, str]]] = []
    mine: list[tuple[int, Mapping[str, torch.Tensor]]] = []  # not consumed yet
    with ThreadPoolExecutor(WRITER_THREADS) as writers:
        for position, layer in enumerate(observer.blocks):
            holder, writes = _holder(position, parallel), _writes(position, parallel)
            if writes and len(written) >= (most := _at_once(observer, layer, exact)):
                written[-most].result()
            tensors = _layer(observer, layer, parallel, exact)
            if writes:
                key, value = observer.attention[position].split(1)
                tensors |= {"key.amax": key, "value.amax": value}
                tensors |= {f"{name}.tokens": observer.tokens[position] for name in LINEARS}
                written.append(writers.submit(save_layer, folder, layer, tensors))
                mine.append((layer, tensors))
            if holder != parallel.data:
                observer.tokens[position] = 0
                for name in LINEARS:
                    observer.sum[:, observer.input_slices[layer, name]] = 0
            for name in () if exact else LINEARS:
                observer.moments.pop((layer, name), None)
            if holder == parallel.layout.data - 1 or position == len(observer.blocks) - 1:
                while mine:  # when each data rank has a layer, all consume at once
                    consume(*mine.pop())
    return dict(file.result() for file in written)


def _at_once(observer: Observer, layer: int, exact: bool) -> int:
    """Layers that may lie ready to be written: as half of the free memory takes, one at least."""
    if (layer, next(iter(LINEARS))) not in observer.moments:
        return WRITER_THREADS
    places = [observer.input_slices[layer, name] for name in LINEARS]
    entries = sum(2 * strip_entries(place.stop - place.start, 0, 1) for place in places)
    room = free_memory(observer.parallel.device) // 2 // ((8 if exact else 4) * entries)
    return min(WRITER_THREADS, max(1, room))


def _holder(position: int, parallel: ParallelContext) -> int:
    """The data rank that a layer's sums end on."""
    return position % parallel.layout.data


def _writes(position: int, parallel: ParallelContext) -> bool:
    """This rank writes a layer."""
    turn = position // parallel.layout.data % parallel.layout.tensor
    return _holder(position, parallel) == parallel.data and turn == parallel.tensor


def _layer(
    observer: Observer, layer: int, parallel: ParallelContext, exact: bool
) -> dict[str, torch.Tensor]:
    """A layer's whole tensors; second moments only where they are written."""
    position = list(observer.blocks).index(layer)
    holder, writes = _holder(position, parallel), _writes(position, parallel)
    tensors: dict[str, torch.Tensor] = {}
    for name in LINEARS:
        place = observer.input_slices[layer, name]
        amax, total = observer.amax[:, place], observer.sum[:, place]
        tensors |= {f"{name}.amax": amax, f"{name}.sum": total}
        if (layer, name) not in observer.moments:
            continue
        largest = float((amax.double() * total).max() * UNIT)  # no moment is larger than this
        if largest >= moments.LIMIT:
            raise UserError(
                f"activations of layer {layer}, input of {name}, are as large as "
                f"{float(amax.max()):.2g}: their second moments cannot be summed exactly"
            )
        for key, values in _strips(observer, (layer, name), parallel, holder, exact):
            if writes:
                tensors[key] = values  # goes to the host in the thread that writes it
    return tensors


def _strips(
    observer: Observer, linear: tuple[int, str], parallel: ParallelContext, holder: int, exact: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, values [2,b,K-i b]) of every strip; they are whole on the data rank `holder`."""
    T, kept = parallel.layout.tensor, observer.moments[linear]
    data, tensor = map(dist.get_process_group_ranks, (parallel.data_group, parallel.tensor_group))
    place, (_, name) = observer.input_slices[linear], linear
    width = place.stop - place.start
    dtype = torch.float64 if exact else torch.float32
    for index, rows in enumerate(strips(width)):
        keeper, shape = strip_owner(index, T), (2, rows.stop - rows.start, width - rows.start)
        values = torch.empty(shape, dtype=dtype, device=parallel.device)
        if parallel.tensor == keeper:
            for modality, own in enumerate(kept):
                dist.reduce(own[index], data[holder], group=parallel.data_group)
                if parallel.data == holder:
                    values[modality] = own[index] if exact else moments.to_float32(own[index])
                else:
                    own[index].zero_()
        if T > 1 and parallel.data == holder:
            dist.broadcast(values, tensor[keeper], group=parallel.tensor_group)
        yield f"{name}.moment.{index}", values


def load_saved_sums(observer: Observer, folder: Path, held: Mapping[int, SavedSums]) -> None:
    """Go on from saved sums: the data rank that a layer's sums end on takes them."""
    parallel = observer.parallel
    for position, layer in enumerate(observer.blocks):
        if layer not in held or _holder(position, parallel) != parallel.data:
            continue
        path = folder / held[layer].folder / layer_file(layer)
        with safe_open(path, framework="pt", device=str(parallel.device)) as file:
            for name in LINEARS:
                place = observer.input_slices[layer, name]
                observer.amax[:, place] = file.get_tensor(f"{name}.amax")
                observer.sum[:, place] = file.get_tensor(f"{name}.sum")
                for modality, own in enumerate(observer.moments.get((layer, name), ())):
                    for index, strip in own.items():
                        strip.copy_(file.get_slice(f"{name}.moment.{index}")[modality])
            amax = [file.get_tensor(f"{kind}.amax") for kind in ("key", "value")]
            observer.attention[position] = torch.cat(amax)
            observer.tokens[position] = file.get_tensor("linear_qkv.tokens")
