"""Copies through pinned memory equal plain copies, whatever the number of staging buffers."""

import pytest
import torch

from nemo_vlm_ptq.utils import pinned_memory
from nemo_vlm_ptq.utils.pinned_memory import copy_pinned, start_copy_to_host, to_device

HOST = torch.device("cpu")
ROW_BYTES = 24 * 2


def source_tensor(name: str) -> torch.Tensor:
    """Return one of the tensors to copy."""
    matrix = torch.randn(37, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    tensors = {
        "matrix": matrix,
        "columns": matrix[:, 3:19],
        "vector": matrix[0],
        "scalar": matrix[0, 0],
        "empty": matrix[:0],
        "int16": matrix.view(torch.int16),
    }
    return tensors[name]


def skip_without(device: str) -> None:
    """Skip a CUDA test on a machine without a GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.parametrize("name", ["matrix", "columns", "vector", "scalar", "empty", "int16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_round_trip_to_the_device_preserves_the_tensor(
    device, name, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without(device)
    monkeypatch.setattr(pinned_memory, "STAGING_BYTES", 5 * ROW_BYTES)  # 37 rows: a remainder
    source = source_tensor(name)
    copied = to_device(source, torch.device(device))
    back = to_device(copied, HOST)
    assert copied.device.type == device and back.device == HOST
    assert copied.shape == source.shape and copied.dtype == source.dtype
    assert torch.equal(back, source)
    assert torch.equal(start_copy_to_host(copied)(), source)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_copying_into_a_view_casts_and_leaves_the_rest_unchanged(device) -> None:
    skip_without(device)
    target = torch.zeros(37, 30, dtype=torch.float32, device=device)
    source = source_tensor("columns")
    copy_pinned(target[:, 7:23], source)
    assert torch.equal(target[:, 7:23].cpu(), source.float())
    assert not target[:, :7].any() and not target[:, 23:].any()


def test_a_tensor_on_the_device_is_returned_without_a_copy() -> None:
    source = source_tensor("columns")
    assert to_device(source, HOST) is source
