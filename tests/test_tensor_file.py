"""Safetensors files written piece by piece: any reader finds what was given, bit for bit."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nemo_vlm_ptq.checkpoints.streaming_writer import tensor_file


def layers(count):
    torch.manual_seed(0)
    for index in range(count):
        yield {
            f"{index}.scale": torch.rand(1),
            f"{index}.codes": torch.randint(-8, 8, (6, 4), dtype=torch.int8),
            f"{index}.fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
            f"{index}.nibbles": torch.randint(0, 255, (2, 4), dtype=torch.uint8),
            f"{index}.turned": torch.randn(5, 2).bfloat16().T,
            f"{index}.view": torch.randn(8, 4).half()[2:4],
            f"{index}.odd": torch.randint(-8, 8, (3,), dtype=torch.int8),
        }


def write(path, count=3):
    given = {}
    with tensor_file(path, 7 * count) as add:
        for tensors in layers(count):
            add(tensors)
            given |= tensors
    return given


def test_a_file_holds_what_was_given(tmp_path):
    given, found = write(tmp_path / "file"), load_file(tmp_path / "file")
    assert set(found) == set(given)
    for name, one in given.items():
        assert found[name].dtype == one.dtype and found[name].shape == one.shape
        assert found[name].data_ptr() % one.element_size() == 0
        assert torch.equal(*(part.contiguous().view(torch.uint8) for part in (found[name], one)))
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    for name in "ab":
        write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_that_was_not_finished_is_not_read(tmp_path):
    with pytest.raises(ZeroDivisionError), tensor_file(tmp_path / "file", 6) as add:
        add(next(layers(1)))
        raise ZeroDivisionError
    with pytest.raises(Exception, match="header"):
        load_file(tmp_path / "file")


def test_what_cannot_be_written_is_raised(tmp_path):
    with pytest.raises(KeyError), tensor_file(tmp_path / "file", 1) as add:
        add({"a": torch.zeros(2, dtype=torch.complex64)})
    many = {str(index): torch.zeros(1) for index in range(9)}
    with (
        pytest.raises(AssertionError, match="room for 512"),
        tensor_file(tmp_path / "file", 1) as add,
    ):
        add(many)
