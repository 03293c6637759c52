"""Files of statistics are safetensors files that hold what was given, bit for bit."""

import pytest
import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.checkpoints import hashing_writer as writing
from nemo_vlm_ptq.checkpoints.hashing_writer import write_tensors
from nemo_vlm_ptq.workdir.store import hash_file


@pytest.mark.parametrize("piece", [8, 40, 1 << 26])
def test_a_file_holds_what_was_given(piece, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "PIECE", piece)
    torch.manual_seed(0)
    sums = torch.randn(3, 7, dtype=torch.float64)
    given = {
        "b.moment": sums,
        "a.moment": sums.T,
        "amax": torch.randn(5),
        "row": torch.randn(4, 6)[1],
        "tokens": torch.tensor([3, 2**40]),
        "none": torch.zeros(0, 4),
    }
    sha256 = write_tensors(given, tmp_path / "layer")
    assert sha256 == hash_file(tmp_path / "layer")
    found = load_file(tmp_path / "layer")
    assert set(found) == set(given)
    assert all(torch.equal(found[name], given[name]) for name in given)
    assert all(found[name].dtype == given[name].dtype for name in given)


def test_other_dtypes_are_refused(tmp_path):
    with pytest.raises(KeyError):
        write_tensors({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "layer")
