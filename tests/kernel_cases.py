"""Triton kernels of calibration against eager PyTorch; test_kernels.py runs this file.

Kernels are compiled on a GPU. Elsewhere Triton's interpreter runs them, which TRITON_INTERPRET=1
must enable before the first import of Triton.
"""

import pytest
import torch

from nemo_vlm_ptq.calibrate import sum_kernels
from nemo_vlm_ptq.calibrate.input_moment import InputMoment, diagonal_blocks
from nemo_vlm_ptq.calibrate.losses import group_amax
from nemo_vlm_ptq.calibrate.sketch import (
    SKETCH_UNIT,
    accumulate_sketch,
    assign_tokens,
    block_features,
    zero_blocks,
)
from nemo_vlm_ptq.calibrate.solve import kernels
from nemo_vlm_ptq.calibrate.solve.clipping import CLIP_RATIOS, clip_amax
from nemo_vlm_ptq.calibrate.solve.fake_quantize import fake_quantize_weight
from nemo_vlm_ptq.calibrate.solve.scales import divide_by_pre_quant_scale, round_amax
from nemo_vlm_ptq.calibrate.solve.search import (
    _clipped_losses_batched,
    candidate_loss,
    sample_rows,
)
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.megatron import kernels as model_kernels

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# The interpreter truncates float32 to bfloat16 instead of rounding it.
ROUNDED_DTYPES = DTYPES[INTERPRETED:]


def random_tensor(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def random_moment(width):
    x = random_tensor(512, width, seed=3) * random_tensor(width, seed=4).exp()
    whole = x.T @ x / 512
    return InputMoment(whole_KK=whole, blocks_Ggg=diagonal_blocks(whole, block_features(width)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,width", [(1, 8), (513, 200), (1200, 128)])
def test_column_statistics_cover_the_tokens_of_each_modality(tokens, width, dtype):
    x = random_tensor(tokens, 2 * width, dtype=dtype)[:, :width]
    modality_T = (torch.arange(tokens) % 3).to(DEVICE, torch.int8)
    amax, total = sum_kernels.column_statistics(x, modality_T)
    for row, modality in enumerate((1, 2)):
        magnitude = x[modality_T == modality].float().abs()
        zeros = torch.zeros(width, device=DEVICE)
        assert torch.equal(amax[row], magnitude.amax(dim=0) if len(magnitude) else zeros)
        torch.testing.assert_close(total[row], magnitude.sum(dim=0), rtol=1e-5, atol=0)


def test_column_sums_are_not_finite_where_an_input_is_not_finite():
    x = random_tensor(40, 16)
    x[3, 5], x[4, 6] = torch.nan, torch.inf
    modality = torch.ones(40, dtype=torch.int8, device=DEVICE)
    total = sum_kernels.column_statistics(x, modality)[1][0]
    assert (~total.isfinite()).nonzero().flatten().tolist() == [5, 6]
    modality[3:5] = 0
    assert sum_kernels.column_statistics(x, modality)[1].isfinite().all()


@pytest.mark.parametrize("magnitude", [1.0, 1e3, 1e6, 1e12])
def test_add_rounded_rounds_products_as_torch_does(magnitude):
    product = random_tensor(37, 91) * magnitude
    product[0, :5] = torch.tensor([0.5, 1.5, -2.5, 4194305.5, -0.5])
    total = random_tensor(37, 91, seed=1).double().round()
    expected = total + product.round()
    sum_kernels.add_rounded(total, product[None], 1.0)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 700])
def test_signed_rows_are_those_of_eager_pytorch(width, dtype):
    cpu, ids = torch.device("cpu"), [f"sample {i}" for i in range(3)]
    modality = torch.arange(3 * 50).reshape(3, 50).remainder(3).to(torch.int8)
    x = random_tensor(150, width, dtype=dtype)
    expected = torch.ones(2 * 16, width, dtype=torch.float64)
    found = expected.to(DEVICE)
    accumulate_sketch(expected, x.cpu(), assign_tokens(ids, modality, 16, cpu))
    tokens = assign_tokens(ids, modality, 16, torch.device(DEVICE))
    sum_kernels.add_signed_rows(
        found, x, tokens.order, tokens.starts, tokens.signs, 1 / SKETCH_UNIT
    )
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16][INTERPRETED:])
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (333, 48), (700, 384)])
def test_blocks_of_each_modality_are_added(tokens, width, dtype):
    x = random_tensor(tokens, 2 * width, dtype=dtype)[:, :width]
    modality = torch.arange(tokens, device=DEVICE).div(100).remainder(3).to(torch.int8)
    blocks = zero_blocks(width, torch.device(DEVICE)) + 1
    sum_kernels.add_blocks(blocks, x, modality, 2.0**20)
    for row, found in enumerate(blocks):
        rows = x[modality == row + 1].double().unflatten(1, (len(found), -1))
        expected = torch.einsum("tgi,tgj->gij", rows, rows) * 2.0**20 + 1
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2.0**20 * 1e-3)
        assert torch.equal(found, found.round())
    again = torch.ones_like(blocks)
    sum_kernels.add_blocks(again, x, modality, 2.0**20)
    assert torch.equal(again, blocks)


@pytest.mark.parametrize("dtype", ROUNDED_DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["fp8", "fp8_pc_pt", "int8_sq", "int4_awq", "w4a8_awq"])
def test_weight_delta_is_the_fake_quantized_weight_minus_the_weight(name, scaled, dtype):
    fmt, weight, group_size = FORMATS[name], random_tensor(70, 320, dtype=dtype), 32
    weight[3] = 0
    scale = random_tensor(320, seed=2).exp().to(dtype).float() if scaled else None
    smooth = divide_by_pre_quant_scale(weight, scale)
    amax = {
        "tensor": lambda: smooth.abs().amax().float(),
        "channel": lambda: group_amax(smooth, 320)[:, 0],
        "group": lambda: group_amax(smooth, group_size) * 0.8,
    }[fmt.granularity]()
    amax_2 = None if fmt.second_weight is None else smooth.abs().amax().float()
    found = kernels.weight_delta(
        weight,
        None if scale is None else scale[None],
        amax,
        fmt.weight,
        None if amax_2 is None else amax_2[None],
        torch.float32,
    )
    quantized = fake_quantize_weight(smooth, amax, fmt, amax_2)
    effective = quantized if scale is None else quantized * scale
    assert torch.equal(found, effective - weight.float())


@pytest.mark.parametrize("group_size", [16, 32, 128])
@pytest.mark.parametrize("dtype", ROUNDED_DTYPES)
def test_clip_candidates_have_the_least_cost_in_each_group(dtype, group_size):
    weight, width = random_tensor(70, 256, dtype=dtype), 256
    moment = random_moment(width)
    second_moment = moment.whole_KK
    scale = random_tensor(width, seed=2).exp().to(dtype).float()
    ratios = torch.tensor(CLIP_RATIOS, device=DEVICE)
    plain, found = kernels.clip_candidates(
        weight, scale[None], moment.blocks_Ggg, ratios, "int4", group_size
    )[0]
    smooth, fmt = divide_by_pre_quant_scale(weight, scale), FORMATS["int4_awq"]
    candidates = round_amax(group_amax(smooth, group_size) * ratios[:, None, None], dtype)
    assert torch.equal(plain, group_amax(smooth, group_size))
    costs = []
    for amax in candidates:
        delta = (fake_quantize_weight(smooth, amax, fmt) - smooth.float()) * scale
        parts = delta.double().unflatten(1, (-1, group_size)).transpose(0, 1)
        pairs = second_moment.double().unflatten(1, (-1, group_size))
        pairs = pairs.unflatten(0, (-1, group_size))
        blocks = pairs.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        costs.append((parts @ blocks).mul(parts).sum(dim=2).T)
    cost = torch.stack(costs)
    is_found = found == candidates
    assert is_found.any(dim=0).all()
    found_cost = torch.where(is_found, cost, torch.inf).amin(dim=0)
    torch.testing.assert_close(found_cost, cost.amin(dim=0), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["int4_awq", "w4a8_awq"])
def test_batched_losses_equal_those_of_single_candidates(name):
    weight, width, fmt = random_tensor(90, 256, dtype=torch.float16), 256, FORMATS[name]
    moment = random_moment(width)
    on_cpu = InputMoment(whole_KK=moment.whole_KK.cpu(), blocks_Ggg=moment.blocks_Ggg.cpu())
    scales = random_tensor(3, width, seed=2).exp().half().float()
    sample = sample_rows(weight, 32, 64)
    found = _clipped_losses_batched(sample, moment, fmt, 32, scales)
    for scale, loss in zip(scales, found, strict=True):
        clipped = clip_amax(sample.weight_NK.cpu(), scale.cpu(), on_cpu, fmt, 32).to(DEVICE)
        expected = min(
            candidate_loss(sample, moment, fmt, 32, scale, amax=amax) for amax in (None, clipped)
        )
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


def eager_rotation(x, freqs):
    """Return the rotation of the two halves of each head, rounded after every operation."""
    cos, sin = torch.cos(freqs).to(x.dtype), torch.sin(freqs).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return (x * cos) + (torch.cat((-second, first), dim=-1) * sin)


@pytest.mark.parametrize("dtype", ROUNDED_DTYPES)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [(3, 8), (20, 96), (4, 128)])
def test_rotation_equals_eager_pytorch(heads, dim, per_sample, dtype):
    S, B = 5, 2
    mixed = random_tensor(S, B, heads, 3 * dim, dtype=dtype)
    x, freqs = mixed[..., dim : 2 * dim], random_tensor(S, B if per_sample else 1, 1, dim, seed=1)
    cos, sin = (f(freqs.flatten(0, 2)).to(dtype).contiguous() for f in (torch.cos, torch.sin))
    assert torch.equal(model_kernels.rotate(x, cos, sin), eager_rotation(x, freqs))


@pytest.mark.parametrize("dtype", ROUNDED_DTYPES)
@pytest.mark.parametrize("width", [8, 1500])
def test_gated_silu_equals_eager_pytorch_within_a_rounding(width, dtype):
    x = random_tensor(7, 2 * width, dtype=dtype)
    gate, up = x.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    step = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-6}[dtype]
    torch.testing.assert_close(model_kernels.gated_silu(x), expected, rtol=step, atol=1e-6)
