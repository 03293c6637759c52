"""Codes made piece by piece on a device: those of the whole weight."""

from functools import partial

import pytest
import torch

from nemo_vlm_ptq import numerics
from nemo_vlm_ptq.targets.writing import on_device


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4", "nvfp4"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_codes_made_some_rows_at_a_time_on_any_device_are_the_same(
    kind, device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(on_device, "ON_CPU", 5 * 64)
    monkeypatch.setattr(on_device, "ON_GPU", 7 * 64)
    weight = torch.randn(33, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    granularity = {"int8": "channel", "int4": "group"}.get(kind, "tensor")
    amax = numerics.weight_amax(weight, granularity, 32)
    encode = partial(numerics.encode, kind=kind)
    codes = on_device.on_device(torch.device(device), encode, weight, amax)
    whole = numerics.encode(weight, amax, kind)
    assert codes.device.type == "cpu" and codes.dtype == whole.dtype
    assert torch.equal(codes.view(torch.int8), whole.view(torch.int8))
