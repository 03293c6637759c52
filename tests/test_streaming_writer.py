"""The streaming writer's safetensors files hold the added tensors bit for bit."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nemo_vlm_ptq.checkpoints.streaming_writer import open_streaming_writer

TENSORS_PER_LAYER = 7


def layers(count):
    """Yield the random tensors of each layer."""
    torch.manual_seed(0)
    for index in range(count):
        yield {
            f"{index}.scale": torch.rand(1),
            f"{index}.codes": torch.randint(-8, 8, (6, 4), dtype=torch.int8),
            f"{index}.fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
            f"{index}.nibbles": torch.randint(0, 255, (2, 4), dtype=torch.uint8),
            f"{index}.transposed": torch.randn(5, 2).bfloat16().T,
            f"{index}.view": torch.randn(8, 4).half()[2:4],
            f"{index}.unaligned": torch.randint(-8, 8, (3,), dtype=torch.int8),
        }


def write(path, count=3):
    """Write the tensors of `count` layers; return them."""
    written = {}
    with open_streaming_writer(path, TENSORS_PER_LAYER * count) as add:
        for tensors in layers(count):
            add(tensors)
            written |= tensors
    return written


def test_the_file_holds_the_added_tensors_aligned_to_their_element_size(tmp_path):
    expected, found = write(tmp_path / "file"), load_file(tmp_path / "file")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert found[name].data_ptr() % tensor.element_size() == 0
        assert torch.equal(*(t.contiguous().view(torch.uint8) for t in (found[name], tensor)))
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    for name in "ab":
        write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_unfinished_file_is_not_readable(tmp_path):
    with pytest.raises(ZeroDivisionError), open_streaming_writer(tmp_path / "file", 6) as add:
        add(next(layers(1)))
        raise ZeroDivisionError
    with pytest.raises(Exception, match="header"):
        load_file(tmp_path / "file")


def test_unsupported_dtypes_and_too_many_tensors_raise(tmp_path):
    with pytest.raises(KeyError), open_streaming_writer(tmp_path / "file", 1) as add:
        add({"a": torch.zeros(2, dtype=torch.complex64)})
    many = {str(index): torch.zeros(1) for index in range(9)}
    with (
        pytest.raises(AssertionError, match="512 reserved"),
        open_streaming_writer(tmp_path / "file", 1) as add,
    ):
        add(many)
