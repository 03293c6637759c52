"""Blocks of tensors out of torch_dist folders, whatever chunks they were written in."""

import io
import math

import pytest
import torch

from nemo_vlm_ptq.checkpoints.torch_dist_index import ByteRange, Chunk, StoredTensor
from nemo_vlm_ptq.checkpoints.torch_dist_tensors import (
    LazyConcat,
    LazyTensor,
    read_block,
    read_tensor,
)
from nemo_vlm_ptq.errors import UserError

WHOLE = torch.arange(8 * 6).reshape(8, 6).bfloat16()
CUTS = {
    "whole": [((0, 0), (8, 6))],
    "rows": [((0, 0), (3, 6)), ((3, 0), (5, 6))],
    "columns": [((0, 0), (8, 2)), ((0, 2), (8, 4))],
    "both": [((a, b), (4, 3)) for a in (0, 4) for b in (0, 3)],
}


def store(path, tensors):
    """Files of torch.save one after the other, as torch_dist folders hold them; their places."""
    places, data = [], b"before"
    for tensor in tensors:
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        places.append(ByteRange(path, len(data), len(buffer.getvalue())))
        data += buffer.getvalue()
    path.write_bytes(data)
    return places


def stored(path, whole, cut):
    parts = [whole[tuple(slice(a, a + n) for a, n in zip(*one, strict=True))] for one in cut]
    places = store(path, [part.clone() for part in parts])
    chunks = [Chunk(*one, place) for one, place in zip(cut, places, strict=True)]
    return StoredTensor("x", tuple(whole.shape), whole.dtype, tuple(chunks))


@pytest.mark.parametrize("name", CUTS)
def test_a_block_is_what_the_whole_holds_there(name, tmp_path):
    one = stored(tmp_path / "file", WHOLE, CUTS[name])
    assert torch.equal(read_tensor(one), WHOLE)
    assert torch.equal(read_tensor(one, 5), WHOLE[5])
    assert torch.equal(read_block(one, (2, 1), (4, 4)), WHOLE[2:6, 1:5])
    cut = LazyTensor(one)
    assert cut.get_shape() == [8, 6]
    for place in (slice(3, 5), (slice(None), slice(1, 3)), slice(-2, None), slice(4, 4)):
        assert torch.equal(cut[place], WHOLE[place])


def test_tensors_above_each_other_are_cut_as_one(tmp_path):
    parts = [LazyTensor(stored(tmp_path / str(i), WHOLE + i, CUTS["rows"])) for i in range(2)]
    both, expected = LazyConcat(parts), torch.cat([WHOLE, WHOLE + 1])
    assert both.get_shape() == [16, 6]
    for place in (slice(None), slice(2, 12), slice(9, 11), (slice(0, 16), slice(2, 4))):
        assert torch.equal(both[place], expected[place])


@pytest.mark.parametrize("whole", [torch.tensor(3.5), torch.zeros(0, 4), torch.ones(1)])
def test_tensors_without_axes_or_values_come_back(whole, tmp_path):
    one = stored(tmp_path / "file", whole, [((0,) * whole.dim(), tuple(whole.shape))])
    assert torch.equal(read_tensor(one), whole)


def test_a_view_that_was_saved_with_all_its_memory_comes_back(tmp_path):
    turned = torch.arange(12.0).reshape(3, 4).T[1:3]
    (place,) = store(tmp_path / "file", [turned])
    one = StoredTensor("x", (2, 3), torch.float32, (Chunk((0, 0), (2, 3), place),))
    assert torch.equal(read_tensor(one), turned)


def test_writing_to_what_was_read_changes_no_file(tmp_path):
    one = stored(tmp_path / "file", WHOLE, CUTS["whole"])
    before = (tmp_path / "file").read_bytes()
    read_tensor(one).zero_()
    assert (tmp_path / "file").read_bytes() == before
    assert torch.equal(read_tensor(one), WHOLE)


def test_what_is_not_there_is_refused(tmp_path):
    path = tmp_path / "file"
    one = stored(path, WHOLE, CUTS["rows"])
    part = StoredTensor("x", one.shape, one.dtype, one.chunks[:1])
    with pytest.raises(UserError, match=f"x is not whole: 18 of {math.prod(one.shape)} values"):
        read_tensor(part)
    other = Chunk((0, 0), (4, 6), one.chunks[0].place)
    with pytest.raises(UserError, match="does not hold the part of x it should"):
        read_tensor(StoredTensor("x", one.shape, one.dtype, (other, one.chunks[1])))
    data = bytearray(path.read_bytes())
    start = one.chunks[1].place.offset
    path.write_bytes(data[: start + 40] + bytes(len(data) - start - 40))
    with pytest.raises(UserError, match=f"is damaged at byte {start}"):
        read_tensor(one)
