"""Reader of tensors, and of blocks of tensors, from torch_dist checkpoints.

A block is assembled from the chunks that overlap it, whatever layout wrote them. Files are
memory-mapped, so that only the pages in use are read.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_vlm_ptq.checkpoints.torch_dist_index import ByteRange, StoredTensor, load_range
from nemo_vlm_ptq.errors import UserError


def read_tensor(stored: StoredTensor, first: int | None = None) -> torch.Tensor:
    """Read a whole tensor, or its slice at index `first` of the first axis, by `read_block`."""
    if first is None:
        return read_block(stored, (0,) * len(stored.shape), stored.shape)
    start = (first, *(0 for _ in stored.shape[1:]))
    return read_block(stored, start, (1, *stored.shape[1:]))[0]


def read_block(
    stored: StoredTensor, start: tuple[int, ...], shape: tuple[int, ...]
) -> torch.Tensor:
    """Read a block of a tensor from the chunks that overlap it.

    If one chunk holds the whole block, the result is a view of the mapped file, whose pages are
    read on access. Otherwise it is a copy.

    Args:
        stored: the tensor.
        start: index of the block's first element.
        shape: shape of the block.

    Raises:
        UserError: a chunk is damaged or of another shape, or the chunks do not cover the block.
    """
    block, filled = None, 0
    for chunk in stored.chunks:
        axes = zip(start, shape, chunk.start, chunk.shape, strict=True)
        spans = [(max(a, c), min(a + n, c + m)) for a, n, c, m in axes]
        if any(low >= high for low, high in spans):
            continue
        part = _map_tensor(chunk.byte_range)
        if tuple(part.shape) != chunk.shape:
            raise UserError(
                f"{chunk.byte_range.file}: a chunk of tensor {stored.name} has shape "
                f"{tuple(part.shape)}, expected {chunk.shape}"
            )
        part = part[_slices(spans, chunk.start)]
        if tuple(part.shape) == shape and part.dtype == stored.dtype:
            return part
        if block is None:
            block = torch.empty(shape, dtype=stored.dtype)
        block[_slices(spans, start)] = part
        filled += part.numel()
    if filled != math.prod(shape):
        raise UserError(
            f"tensor {stored.name} is incomplete: {filled} of {math.prod(shape)} elements"
        )
    return torch.empty(shape, dtype=stored.dtype) if block is None else block


def _slices(spans: Iterable[tuple[int, int]], origin: Iterable[int]) -> tuple[slice, ...]:
    """Return slices of the spans relative to an origin."""
    return tuple(slice(a - o, b - o) for (a, b), o in zip(spans, origin, strict=True))


def _map_tensor(byte_range: ByteRange) -> torch.Tensor:
    """Return a tensor over the memory-mapped file; writes to it do not reach the file."""
    with FakeTensorMode():  # finds the offset of the data without reading it
        fake = load_range(byte_range)
    if not isinstance(fake, torch.Tensor):
        raise UserError(f"{byte_range.file}: no tensor at byte {byte_range.offset}")
    storage = fake.untyped_storage()
    assert storage._checkpoint_offset is not None, "torch.load sets it under FakeTensorMode"
    size, data_start = storage.nbytes(), byte_range.offset + storage._checkpoint_offset
    if data_start + size > byte_range.offset + byte_range.length:
        raise UserError(
            f"{byte_range.file} is damaged at byte {byte_range.offset}: the tensor is truncated"
        )
    if not size:
        return torch.empty(fake.shape, dtype=fake.dtype)
    padding = data_start % mmap.ALLOCATIONGRANULARITY  # a mapping starts at a page boundary
    with byte_range.file.open("rb") as file:
        pages = mmap.mmap(
            file.fileno(), padding + size, access=mmap.ACCESS_COPY, offset=data_start - padding
        )
    flat = torch.frombuffer(pages, dtype=fake.dtype, offset=padding)
    return flat.as_strided(fake.shape, fake.stride(), fake.storage_offset())
