"""The hashing writer's safetensors files hold the given tensors bit for bit."""

import pytest
import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.checkpoints import hashing_writer
from nemo_vlm_ptq.checkpoints.hashing_writer import write_and_hash
from nemo_vlm_ptq.workdir.store import hash_file


@pytest.mark.parametrize("staging_bytes", [8, 40, 1 << 26])
def test_the_file_holds_the_tensors_and_has_the_returned_hash(staging_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(hashing_writer, "STAGING_BYTES", staging_bytes)
    torch.manual_seed(0)
    matrix = torch.randn(3, 7, dtype=torch.float64)
    tensors = {
        "b.moment": matrix,
        "a.moment": matrix.T,
        "amax": torch.randn(5),
        "row": torch.randn(4, 6)[1],
        "tokens": torch.tensor([3, 2**40]),
        "empty": torch.zeros(0, 4),
    }
    sha256 = write_and_hash(tensors, tmp_path / "layer")
    assert sha256 == hash_file(tmp_path / "layer")
    found = load_file(tmp_path / "layer")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert all(found[name].dtype == tensors[name].dtype for name in tensors)


def test_unsupported_dtypes_raise(tmp_path):
    with pytest.raises(KeyError):
        write_and_hash({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "layer")
