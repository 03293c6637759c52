"""Copies between host and GPU, piece by piece: what a plain copy gives."""

import pytest
import torch

from nemo_vlm_ptq.utils import pinned_memory as page_locked
from nemo_vlm_ptq.utils.pinned_memory import copy_pinned, start_copy_to_host, to_device

HOST = torch.device("cpu")


def given(kind: str) -> torch.Tensor:
    whole = torch.randn(37, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    every = {
        "whole": whole,
        "columns": whole[:, 3:19],
        "vector": whole[0],
        "number": whole[0, 0],
        "empty": whole[:0],
        "codes": whole.view(torch.int16),
    }
    return every[kind]


@pytest.mark.parametrize("kind", ["whole", "columns", "vector", "number", "empty", "codes"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_arrives_is_what_was_sent_there_and_back(
    device, kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(page_locked, "PIECE", 5 * 48)  # five rows and a rest
    sent = given(kind)
    there = to_device(sent, torch.device(device))
    back = to_device(there, HOST)
    assert there.device.type == device and back.device == HOST
    assert there.shape == sent.shape and there.dtype == sent.dtype
    assert torch.equal(back, sent)
    assert torch.equal(start_copy_to_host(there)(), sent)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_it_is_copied_into_keeps_its_place_and_its_dtype(device) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    around, sent = torch.zeros(37, 30, dtype=torch.float32, device=device), given("columns")
    copy_pinned(around[:, 7:23], sent)
    assert torch.equal(around[:, 7:23].cpu(), sent.float())
    assert not around[:, :7].any() and not around[:, 23:].any()


def test_nothing_is_copied_on_one_device() -> None:
    sent = given("columns")
    assert to_device(sent, HOST) is sent
