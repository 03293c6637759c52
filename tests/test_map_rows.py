"""Codes computed in slices of rows on a device equal those of the whole weight."""

from functools import partial

import pytest
import torch

from nemo_vlm_ptq import numerics
from nemo_vlm_ptq.targets.writing import map_rows

COLUMNS = 64


@pytest.mark.parametrize("number_format", ["fp8", "int8", "int4", "nvfp4"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_codes_in_slices_of_rows_on_any_device_equal_those_of_the_whole_weight(
    number_format, device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(map_rows, "CPU_SLICE_NUMEL", 5 * COLUMNS)
    monkeypatch.setattr(map_rows, "GPU_SLICE_NUMEL", 7 * COLUMNS)
    weight = torch.randn(33, COLUMNS, generator=torch.Generator().manual_seed(1)).bfloat16()
    granularity = {"int8": "channel", "int4": "group"}.get(number_format, "tensor")
    amax = numerics.weight_amax(weight, granularity, 32)
    encode = partial(numerics.encode, number_format=number_format)
    codes = map_rows.map_rows(encode, weight.to(device), amax.to(device)).cpu()
    expected = numerics.encode(weight, amax, number_format)
    assert codes.dtype == expected.dtype
    assert torch.equal(codes.view(torch.int8), expected.view(torch.int8))
