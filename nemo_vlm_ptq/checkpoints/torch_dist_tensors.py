"""Tensors and blocks of them out of torch_dist folders, whichever ranks wrote them in what chunks.

Files are mapped: what nobody uses is not read.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_vlm_ptq.checkpoints.torch_dist_index import ByteRange, StoredTensor, load_range
from nemo_vlm_ptq.errors import UserError


def read_tensor(stored: StoredTensor, first: int | None = None) -> torch.Tensor:
    """A whole tensor, or the entry `first` of its first axis; see `read_block`."""
    if first is None:
        return read_block(stored, (0,) * len(stored.shape), stored.shape)
    start = (first, *(0 for _ in stored.shape[1:]))
    return read_block(stored, start, (1, *stored.shape[1:]))[0]


def read_block(
    stored: StoredTensor, start: tuple[int, ...], shape: tuple[int, ...]
) -> torch.Tensor:
    """A block of a tensor, from the chunks that hold it.

    Where one chunk holds it all, its values are those of the mapped file: they are read when they
    are used, and no others.

    Args:
        stored: the tensor.
        start: index of the block's first element.
        shape: of the block.

    Raises:
        UserError: chunks are damaged, of another shape, or do not make up the block.
    """
    whole, filled = None, 0
    for chunk in stored.chunks:
        ends = zip(start, shape, chunk.start, chunk.shape, strict=True)
        spans = [(max(a, c), min(a + n, c + m)) for a, n, c, m in ends]
        if any(low >= high for low, high in spans):
            continue
        part = _mapped(chunk.place)
        if tuple(part.shape) != chunk.shape:
            raise UserError(f"{chunk.place.file} does not hold the part of {stored.name} it should")
        part = part[_slices(spans, chunk.start)]
        if tuple(part.shape) == shape and part.dtype == stored.dtype:
            return part
        if whole is None:
            whole = torch.empty(shape, dtype=stored.dtype)
        whole[_slices(spans, start)] = part
        filled += part.numel()
    if filled != math.prod(shape):
        raise UserError(f"tensor {stored.name} is not whole: {filled} of {math.prod(shape)} values")
    return torch.empty(shape, dtype=stored.dtype) if whole is None else whole


def _slices(spans: Iterable[tuple[int, int]], origin: Iterable[int]) -> tuple[slice, ...]:
    """Spans counted from an origin."""
    return tuple(slice(a - o, b - o) for (a, b), o in zip(spans, origin, strict=True))


def _mapped(place: ByteRange) -> torch.Tensor:
    """The tensor that lies somewhere, over the mapped file; writing to it changes no file."""
    with FakeTensorMode():  # finds out where its values lie and reads none
        told = load_range(place)
    if not isinstance(told, torch.Tensor):
        raise UserError(f"{place.file} holds no tensor at byte {place.offset}")
    memory = told.untyped_storage()
    assert memory._checkpoint_offset is not None, "torch says so of tensors that are not real"
    size, begin = memory.nbytes(), place.offset + memory._checkpoint_offset
    if begin + size > place.offset + place.length:
        raise UserError(f"{place.file} is damaged at byte {place.offset}: it ends too soon")
    if not size:
        return torch.empty(told.shape, dtype=told.dtype)
    before = begin % mmap.ALLOCATIONGRANULARITY  # files are mapped from the start of a page
    with place.file.open("rb") as file:
        pages = mmap.mmap(
            file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=begin - before
        )
    flat = torch.frombuffer(pages, dtype=told.dtype, offset=before)
    return flat.as_strided(told.shape, told.stride(), told.storage_offset())


class LazyTensor:
    """A stored tensor that is cut like a tensor; no more is read than what is cut out."""

    def __init__(self, stored: StoredTensor) -> None:
        self.stored = stored

    def get_shape(self) -> list[int]:
        """Of the whole."""
        return list(self.stored.shape)

    def __getitem__(self, cut: slice | tuple[slice, ...]) -> torch.Tensor:
        """What slices of step 1 cut out; later axes are whole where none is given."""
        given = cut if isinstance(cut, tuple) else (cut,)
        sizes = self.stored.shape
        every = [*given, *[slice(None)] * (len(sizes) - len(given))]
        spans = [one.indices(size) for one, size in zip(every, sizes, strict=True)]
        start = tuple(low for low, _, _ in spans)
        return read_block(self.stored, start, tuple(max(0, b - a) for a, b, _ in spans))


class LazyConcat:
    """Tensors above each other, cut as if they were one."""

    def __init__(self, parts: Sequence[LazyTensor]) -> None:
        self.parts = parts

    def get_shape(self) -> list[int]:
        """Of all together."""
        shapes = [part.get_shape() for part in self.parts]
        return [sum(shape[0] for shape in shapes), *shapes[0][1:]]

    def __getitem__(self, cut: slice | tuple[slice, ...]) -> torch.Tensor:
        """What slices of step 1 cut out; copied only where it goes over an edge."""
        rows, *others = cut if isinstance(cut, tuple) else (cut,)
        start, stop, _ = rows.indices(self.get_shape()[0])
        found, first = [], 0
        for part in self.parts:
            size = part.get_shape()[0]
            low, high = max(start, first), min(stop, first + size)
            if low < high:
                found.append(part[(slice(low - first, high - first), *others)])
            first += size
        return torch.cat(found) if found[1:] else found[0]
