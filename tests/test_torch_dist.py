"""Indices of torch_dist folders, whichever Python wrote them, and nothing else from a pickle."""

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


def by_name(member):
    """How Python 3.11.2, for one, pickles a member of an enumeration."""
    return getattr, (type(member), member.name)


class Attribute:
    def __init__(self, *asked):
        self.asked = asked

    def __reduce__(self):
        return getattr, self.asked


@pytest.fixture
def folder(tmp_path):
    """A tensor as torch saves it."""
    checkpoint.save({"x": torch.arange(6).reshape(2, 3)}, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path


def test_an_index_is_read_whichever_way_python_pickles_members(folder):
    index = pickle.loads((folder / INDEX).read_bytes())
    index.storage_meta = None  # a path, which Megatron does not store
    written = io.BytesIO()
    pickler = pickle.Pickler(written)
    pickler.dispatch_table = copyreg.dispatch_table | {records._MEM_FORMAT_ENCODING: by_name}
    pickler.dump(index)
    assert b"getattr" in written.getvalue()
    (folder / INDEX).write_bytes(written.getvalue())
    found = read_tensor(read_index(folder).tensors["x"])
    assert torch.equal(found, torch.arange(6).reshape(2, 3))


@pytest.mark.parametrize("asked", [(torch.Size, "__class__"), (records.Metadata, "__init__")])
def test_an_index_asks_for_no_other_attributes(folder, asked):
    (folder / INDEX).write_bytes(pickle.dumps(Attribute(*asked)))
    with pytest.raises(UserError, match=f"it asks for {asked[1]}"):
        read_index(folder)
