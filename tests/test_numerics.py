"""Codes do not depend on how a reader rounds its arithmetic."""

import pytest
import torch

from nemo_vlm_ptq.formats import LARGEST
from nemo_vlm_ptq.numerics import encode, off_ties


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_weights_off_ties_get_the_same_codes_however_a_reader_divides(kind, dtype):
    torch.manual_seed(0)
    ties = 0
    for amax in torch.linspace(0.08, 0.16, 41).bfloat16().float():
        scale = amax / LARGEST[kind]
        codes = torch.randint(-7, 7, (64, 64)) + 0.5 * torch.randint(0, 2, (64, 64))
        codes = codes * 6 if kind == "fp8" else codes  # steps of fp8 are 2 from 16 to 32
        weight = (codes * scale).to(dtype)
        kept = off_ties(weight, amax, kind)
        wanted = encode(weight, amax, kind).float()
        assert torch.equal(encode(kept, amax, kind).float(), wanted)
        for factor in (LARGEST[kind] / amax, 1 / scale):  # a reciprocal, as torch has it; and ours
            exact = kept.float() * factor
            found = exact.to(torch.float8_e4m3fn).float() if kind == "fp8" else exact.round()
            assert torch.equal(found, wanted)
        ties += int((kept != weight).sum())
    assert ties or dtype != torch.float32


def test_a_bfloat16_weight_half_way_between_two_codes_of_fp8_is_moved():
    weight, amax = torch.tensor([[0.016845703125]]).bfloat16(), torch.tensor(0.08984375)
    reciprocal = LARGEST["fp8"] * amax.reciprocal()  # as torch divides a number by a tensor
    assert (weight.float() * (amax.new_tensor(448.0) / amax)).item() == 84.0  # between 80 and 88
    assert (weight.float() * reciprocal).item() > 84.0
    kept = off_ties(weight, amax, "fp8")
    assert (kept.float() * reciprocal).to(torch.float8_e4m3fn).float().item() == 80.0
