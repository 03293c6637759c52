"""Indices of torch_dist checkpoints: all releases of Python are read, other pickles rejected."""

import copyreg
import io
import pickle

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import metadata as records

from nemo_vlm_ptq.checkpoints.torch_dist_index import INDEX, read_index
from nemo_vlm_ptq.checkpoints.torch_dist_tensors import read_tensor
from nemo_vlm_ptq.errors import UserError


def reduce_by_name(member):
    """Pickle an enum member through getattr, as Python 3.11.2 does."""
    return getattr, (type(member), member.name)


class Attribute:
    """Object whose pickle calls getattr."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


@pytest.fixture
def folder(tmp_path):
    """Return a checkpoint of one tensor, saved by torch."""
    checkpoint.save({"x": torch.arange(6).reshape(2, 3)}, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path


def test_enum_members_pickled_by_getattr_are_read(folder):
    index = pickle.loads((folder / INDEX).read_bytes())
    index.storage_meta = None  # a path, which Megatron does not store
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer)
    pickler.dispatch_table = copyreg.dispatch_table | {records._MEM_FORMAT_ENCODING: reduce_by_name}
    pickler.dump(index)
    assert b"getattr" in buffer.getvalue()
    (folder / INDEX).write_bytes(buffer.getvalue())
    tensor = read_tensor(read_index(folder).tensors["x"])
    assert torch.equal(tensor, torch.arange(6).reshape(2, 3))


@pytest.mark.parametrize("arguments", [(torch.Size, "__class__"), (records.Metadata, "__init__")])
def test_other_attributes_are_rejected(folder, arguments):
    (folder / INDEX).write_bytes(pickle.dumps(Attribute(*arguments)))
    with pytest.raises(UserError, match=f"unsupported attribute {arguments[1]} of "):
        read_index(folder)
