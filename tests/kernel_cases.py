"""Triton kernels of calibration against plain torch, as test_kernels.py runs them.

On a GPU they are compiled; elsewhere Triton's interpreter runs them, which TRITON_INTERPRET=1 has
to ask for before Triton is imported by anyone.
"""

import pytest
import torch

from nemo_vlm_ptq.calibrate import kernels
from nemo_vlm_ptq.calibrate.losses import group_amax
from nemo_vlm_ptq.calibrate.solve.clipping import CLIP_RATIOS, clip_amax
from nemo_vlm_ptq.calibrate.solve.fake_quantize import fake_quantize_weight
from nemo_vlm_ptq.calibrate.solve.scales import divide_by_pre_quant_scale, round_amax
from nemo_vlm_ptq.calibrate.solve.search import _losses_together, candidate_loss, sample_rows
from nemo_vlm_ptq.formats import FORMATS

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROUNDED = DTYPES[INTERPRETED:]  # the interpreter cuts float32 off to bfloat16, it does not round


def drawn(*shape, dtype=torch.float32, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=made).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,width", [(1, 8), (513, 200), (1200, 128)])
def test_column_statistics_are_those_of_each_kind_of_token(tokens, width, dtype):
    x = drawn(tokens, 2 * width, dtype=dtype)[:, :width]
    kind = (torch.arange(tokens) % 3).to(DEVICE, torch.int8)
    top, total = kernels.column_statistics(x, kind)
    for row, wanted in enumerate((1, 2)):
        own = x[kind == wanted].float().abs()
        largest = own.amax(dim=0) if len(own) else torch.zeros(width, device=DEVICE)
        assert torch.equal(top[row], largest)
        torch.testing.assert_close(total[row], own.sum(dim=0), rtol=1e-5, atol=0)


def test_a_sum_shows_what_is_not_finite():
    x = drawn(40, 16)
    x[3, 5], x[4, 6] = torch.nan, torch.inf
    kind = torch.ones(40, dtype=torch.int8, device=DEVICE)
    total = kernels.column_statistics(x, kind)[1][0]
    assert (~total.isfinite()).nonzero().flatten().tolist() == [5, 6]
    kind[3:5] = 0
    assert kernels.column_statistics(x, kind)[1].isfinite().all()


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6, 1e12])
def test_rounded_products_are_added_as_torch_rounds_them(size):
    product = drawn(37, 91) * size
    product[0, :5] = torch.tensor([0.5, 1.5, -2.5, 4194305.5, -0.5])
    total = drawn(37, 91, seed=1).double().round()
    expected = total + product.round()
    kernels.add_rounded(total, product)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["fp8", "fp8_pc_pt", "int8_sq", "int4_awq", "w4a8_awq"])
def test_the_change_is_that_of_the_rounded_weight(name, scaled, dtype):
    row, weight, group = FORMATS[name], drawn(70, 320, dtype=dtype), 32
    weight[3] = 0
    pre_quant_scale = drawn(320, seed=2).exp().to(dtype).float() if scaled else None
    smooth = divide_by_pre_quant_scale(weight, pre_quant_scale)
    amax = {
        "tensor": lambda: smooth.abs().amax().float(),
        "channel": lambda: group_amax(smooth, 320)[:, 0],
        "group": lambda: group_amax(smooth, group) * 0.8,
    }[row.granularity]()
    second = None if row.second_weight is None else smooth.abs().amax().float()
    one = None if pre_quant_scale is None else pre_quant_scale[None]
    two = None if second is None else second[None]
    found = kernels.weight_delta(weight, one, amax, row.weight, two, torch.float32)
    seen = fake_quantize_weight(smooth, amax, row, second)
    assert torch.equal(
        found, (seen if pre_quant_scale is None else seen * pre_quant_scale) - weight.float()
    )


@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize("dtype", ROUNDED)
def test_clipped_takes_the_amax_of_least_cost(dtype, group):
    weight, width = drawn(70, 256, dtype=dtype), 256
    x = drawn(512, width, seed=3) * drawn(width, seed=4).exp()
    moment = x.T @ x / 512
    pre_quant_scale = drawn(width, seed=2).exp().to(dtype).float()
    ratios = torch.tensor(CLIP_RATIOS, device=DEVICE)
    plain, found = kernels.clip_candidates(
        weight, pre_quant_scale[None], moment, ratios, "int4", group
    )[0]
    smooth, row = divide_by_pre_quant_scale(weight, pre_quant_scale), FORMATS["int4_awq"]
    tried = round_amax(group_amax(smooth, group) * ratios[:, None, None], dtype)
    assert torch.equal(plain, group_amax(smooth, group))
    costs = []
    for amax in tried:
        moved = (fake_quantize_weight(smooth, amax, row) - smooth.float()) * pre_quant_scale
        parts = moved.double().unflatten(1, (-1, group)).transpose(0, 1)
        blocks = moment.double().unflatten(1, (-1, group)).unflatten(0, (-1, group))
        own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        costs.append((parts @ own).mul(parts).sum(dim=2).T)
    cost = torch.stack(costs)
    equal = found == tried
    assert equal.any(dim=0).all()
    taken = torch.where(equal, cost, torch.inf).amin(dim=0)
    torch.testing.assert_close(taken, cost.amin(dim=0), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["int4_awq", "w4a8_awq"])
def test_candidates_together_lose_what_each_loses_alone(name):
    weight, width, row = drawn(90, 256, dtype=torch.float16), 256, FORMATS[name]
    x = drawn(512, width, seed=3) * drawn(width, seed=4).exp()
    moment = x.T @ x / 512
    scales = drawn(3, width, seed=2).exp().half().float()
    sample = sample_rows(weight, 32, 64)
    found = _losses_together(sample, moment, row, 32, scales)
    for pre_quant_scale, loss in zip(scales, found, strict=True):
        clipped = clip_amax(
            sample.weight_NK.cpu(), pre_quant_scale.cpu(), moment.cpu(), row, 32
        ).to(DEVICE)
        alone = [
            candidate_loss(sample, moment, row, 32, pre_quant_scale, amax=a)
            for a in (None, clipped)
        ]
        torch.testing.assert_close(loss, min(alone), rtol=1e-3, atol=0)
