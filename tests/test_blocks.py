"""Blocks of tensors read from torch_dist files, whatever chunks they were written in."""

import io
import math

import pytest
import torch

from nemo_vlm_ptq.checkpoints.torch_dist_index import ByteRange, Chunk, StoredTensor
from nemo_vlm_ptq.checkpoints.torch_dist_tensors import read_block, read_tensor
from nemo_vlm_ptq.errors import UserError

TENSOR = torch.arange(8 * 6).reshape(8, 6).bfloat16()
CHUNKINGS = {  # name -> (start, shape) of each chunk
    "one": [((0, 0), (8, 6))],
    "rows": [((0, 0), (3, 6)), ((3, 0), (5, 6))],
    "columns": [((0, 0), (8, 2)), ((0, 2), (8, 4))],
    "rows and columns": [((a, b), (4, 3)) for a in (0, 4) for b in (0, 3)],
}


def write_file(path, tensors):
    """Write files of torch.save one after another, as in .distcp; return their byte ranges."""
    ranges, data = [], b"before"
    for tensor in tensors:
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        ranges.append(ByteRange(path, offset=len(data), length=len(buffer.getvalue())))
        data += buffer.getvalue()
    path.write_bytes(data)
    return ranges


def write_chunks(path, tensor, chunking):
    """Write a tensor in chunks of the given (start, shape)."""
    parts = [
        tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
        for start, shape in chunking
    ]
    ranges = write_file(path, [part.clone() for part in parts])
    chunks = tuple(
        Chunk(start=start, shape=shape, byte_range=byte_range)
        for (start, shape), byte_range in zip(chunking, ranges, strict=True)
    )
    return StoredTensor("x", tuple(tensor.shape), tensor.dtype, chunks)


@pytest.mark.parametrize("name", CHUNKINGS)
def test_a_block_equals_the_slice_of_the_whole_tensor(name, tmp_path):
    stored = write_chunks(tmp_path / "file", TENSOR, CHUNKINGS[name])
    assert torch.equal(read_tensor(stored), TENSOR)
    assert torch.equal(read_tensor(stored, 5), TENSOR[5])
    assert torch.equal(read_block(stored, (2, 1), (4, 4)), TENSOR[2:6, 1:5])


@pytest.mark.parametrize("tensor", [torch.tensor(3.5), torch.zeros(0, 4), torch.ones(1)])
def test_scalars_and_empty_tensors_are_read(tensor, tmp_path):
    chunking = [((0,) * tensor.dim(), tuple(tensor.shape))]
    assert torch.equal(read_tensor(write_chunks(tmp_path / "file", tensor, chunking)), tensor)


def test_a_view_saved_with_its_whole_storage_is_read(tmp_path):
    view = torch.arange(12.0).reshape(3, 4).T[1:3]
    (byte_range,) = write_file(tmp_path / "file", [view])
    chunk = Chunk(start=(0, 0), shape=(2, 3), byte_range=byte_range)
    assert torch.equal(read_tensor(StoredTensor("x", (2, 3), torch.float32, (chunk,))), view)


def test_writing_to_a_tensor_that_was_read_does_not_change_the_file(tmp_path):
    stored = write_chunks(tmp_path / "file", TENSOR, CHUNKINGS["one"])
    before = (tmp_path / "file").read_bytes()
    read_tensor(stored).zero_()
    assert (tmp_path / "file").read_bytes() == before
    assert torch.equal(read_tensor(stored), TENSOR)


def test_missing_mismatched_and_damaged_chunks_are_rejected(tmp_path):
    path = tmp_path / "file"
    stored = write_chunks(path, TENSOR, CHUNKINGS["rows"])
    part = StoredTensor("x", stored.shape, stored.dtype, stored.chunks[:1])
    expected = f"tensor x is incomplete: 18 of {math.prod(stored.shape)} elements"
    with pytest.raises(UserError, match=expected):
        read_tensor(part)
    taller = Chunk(start=(0, 0), shape=(4, 6), byte_range=stored.chunks[0].byte_range)
    with pytest.raises(UserError, match=r"tensor x has shape \(3, 6\), expected \(4, 6\)"):
        read_tensor(StoredTensor("x", stored.shape, stored.dtype, (taller, stored.chunks[1])))
    data = bytearray(path.read_bytes())
    start = stored.chunks[1].byte_range.offset
    path.write_bytes(data[: start + 40] + bytes(len(data) - start - 40))
    with pytest.raises(UserError, match=f"is damaged at byte {start}"):
        read_tensor(stored)
