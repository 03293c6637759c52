"""What ranks have observed, put together and written, and how much of it fits on a rank at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from nemo_vlm_ptq.calibrate import moments
from nemo_vlm_ptq.calibrate.observe import Observer
from nemo_vlm_ptq.calibrate.statistics import LINEARS, ROW_PARALLEL, UNIT, save_layer
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.megatron.session import Session, local_world
from nemo_vlm_ptq.parallel import split_evenly, strip_entries, strip_owner, strips

SHARE = 0.8  # of the free memory that second moments take unless the recipe says how much


def observe_in_passes(
    model: GPTModel,
    session: Session,
    folder: Path,
    limit: int | None,
    run: Callable[[Sequence[int]], Observer],
) -> tuple[list[str], Observer]:
    """Observe this rank's layers, as many at a time as their second moments leave room for.

    Args:
        model: this rank's part of the decoder.
        session: this rank's place.
        folder: where each layer is written, once.
        limit: bytes of second moments on a rank, 0 when none are wanted; None: what is free.
        run: runs the data through the model and observes some layers.

    Returns:
        Files that this rank wrote, and the last pass.

    Raises:
        UserError: the limit is less than one layer takes.
    """
    layers = [block.layer_number - 1 for block in model.decoder.layers]
    passes = 1 if limit == 0 else max(session.gather(_passes(model, session, limit)))
    written: list[str] = []
    for turn in range(passes):
        observer = run(split_evenly(layers, passes, turn))
        written += reduce_and_save(observer, session, folder)
    return written, observer


def _passes(model: GPTModel, session: Session, limit: int | None) -> int:
    """Times that the data runs through this rank."""
    T, t = session.layout.tensor, session.tensor
    block = model.decoder.layers[0]
    layer = 0
    for name, path in LINEARS.items():
        width = block.get_submodule(path).weight.shape[1] * (T if name in ROW_PARALLEL else 1)
        layer += 2 * 8 * strip_entries(width, t, T)
    room = _free(session.device) if limit is None else limit
    fitting = int(room // layer)
    if not fitting:
        raise UserError(
            f"second moments of one layer take {layer / 1e6:,.1f} MB on a rank, and there is room "
            f"for {room / 1e6:,.1f} MB; raise calibration.max_statistics_memory or parallel.tensor"
        )
    return -(-len(model.decoder.layers) // fitting)


def _free(device: torch.device) -> int:
    """Bytes that second moments may take on a rank."""
    if device.type == "cuda":
        sharing = -(-local_world() // torch.cuda.device_count())
        return int(SHARE * torch.cuda.mem_get_info(device)[0] / sharing)
    return int(SHARE * psutil.virtual_memory().available / local_world())


def reduce_and_save(observer: Observer, session: Session, folder: Path) -> list[str]:
    """Put the ranks' statistics together and write each layer once; returns this rank's files.

    Layers are dealt over the data ranks; of those, tensor rank 0 writes.

    Raises:
        UserError: activations too large for the fixed point of second moments.
    """
    dist.all_reduce(observer.amax, dist.ReduceOp.MAX, group=session.data_group)
    dist.all_reduce(observer.sum, group=session.data_group)
    tokens = torch.tensor(list(observer.tokens.values()), device=session.device)
    dist.all_reduce(tokens, group=session.data_group)
    for group in (session.data_group, session.tensor_group):
        dist.all_reduce(observer.attention, dist.ReduceOp.MAX, group=group)
    written = []
    for position, layer in enumerate(observer.blocks):
        holder = position % session.layout.data
        writes = session.tensor == 0 and holder == session.data
        tensors = _layer(observer, layer, session, holder, writes)
        key, value = observer.attention[position].split(1)
        tensors |= {"key.amax": key, "value.amax": value}
        tensors |= {f"{name}.tokens": tokens for name in LINEARS}
        if writes:
            written.append(save_layer(folder, layer, tensors))
    return written


def _layer(
    observer: Observer, layer: int, session: Session, holder: int, writes: bool
) -> dict[str, torch.Tensor]:
    """A layer's whole tensors; second moments only where they are written."""
    tensors: dict[str, torch.Tensor] = {}
    for name in LINEARS:
        place = observer.places[layer, name]
        amax, total = observer.amax[:, place], observer.sum[:, place]
        if name in ROW_PARALLEL:
            amax, total = _join(amax, session), _join(total, session)
        tensors |= {f"{name}.amax": amax, f"{name}.sum": total}
        if (layer, name) not in observer.moments:
            continue
        largest = float((amax.double() * total).max() * UNIT)  # no moment is larger than this
        if largest >= moments.LIMIT:
            raise UserError(
                f"activations of layer {layer}, input of {name}, are as large as "
                f"{float(amax.max()):.2g}: their second moments cannot be summed exactly"
            )
        for key, values in _strips(observer, layer, name, session, holder):
            if writes:
                tensors[key] = values.cpu()
    return tensors


def _strips(
    observer: Observer, layer: int, name: str, session: Session, holder: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """(index, values [2,b,K-i b]) of every strip; they are whole on the data rank `holder`."""
    T, kept = session.layout.tensor, observer.moments[layer, name]
    data, tensor = map(dist.get_process_group_ranks, (session.data_group, session.tensor_group))
    place = observer.places[layer, name]
    width = observer.full_width(name, place.stop - place.start)
    for index, rows in enumerate(strips(width)):
        keeper = strip_owner(index, T)
        values = torch.empty(2, rows.stop - rows.start, width - rows.start, device=session.device)
        if session.tensor == keeper:
            for modality, own in enumerate(kept):
                dist.reduce(own[index], data[holder], group=session.data_group)
                values[modality] = moments.values(own[index])
        if T > 1 and session.data == holder:
            dist.broadcast(values, tensor[keeper], group=session.tensor_group)
        yield f"{name}.moment.{index}", values


def _join(part: torch.Tensor, session: Session) -> torch.Tensor:
    """All inputs of a row-parallel linear, from what each tensor rank has of them."""
    parts = [torch.empty_like(part) for _ in range(session.layout.tensor)]
    dist.all_gather(parts, part.contiguous(), group=session.tensor_group)
    return torch.cat(parts, dim=1)
