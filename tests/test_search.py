"""Searches of solve against plain loops over all that could have been chosen."""

from dataclasses import replace

import pytest
import torch
from solving import GROUP, SHAPES, observed, solved, weights

from nemo_vlm_ptq.calibrate import losses
from nemo_vlm_ptq.calibrate.solve import awq as awq_module
from nemo_vlm_ptq.calibrate.solve import clipping as clip_module
from nemo_vlm_ptq.calibrate.solve.awq import awq, candidate_scales
from nemo_vlm_ptq.calibrate.solve.clipping import CLIP_RATIOS, clip_amax
from nemo_vlm_ptq.calibrate.solve.layer import SolveOptions
from nemo_vlm_ptq.calibrate.solve.scales import divide_by_pre_quant_scale, make_scales, round_amax
from nemo_vlm_ptq.calibrate.solve.search import (
    ALPHA_STEPS,
    candidate_loss,
    sample_rows,
    search_alpha,
)
from nemo_vlm_ptq.calibrate.solve.smoothquant import input_noise, smoothing_scale, smoothquant
from nemo_vlm_ptq.calibrate.solve.svdquant import direction_finder, low_rank_factors
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.numerics import fake_quantize, weight_amax


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """(statistics, tokens) of a layer that has seen text and images."""
    return observed(tmp_path_factory.mktemp("statistics"))


@pytest.mark.parametrize("name", ["int4_awq", "w4a8_awq", "nvfp4_awq", "nvfp4_svdquant"])
def test_awq_is_better_than_plain_maxima(name, layer):
    plain = {"int4_awq": "int4_wo", "w4a8_awq": "int4_wo"}.get(name, "nvfp4")
    ours, theirs = solved(name, layer), solved(plain, layer)
    assert all(ours[linear].error < 0.95 * theirs[linear].error for linear in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("linear", SHAPES)
def test_the_exponent_found_in_ten_looks_is_the_best_of_all_twenty_one(linear, dtype, layer):
    row, weight, seen = FORMATS["int4_awq"], weights(dtype)[linear], layer[0][linear]
    sample, scales_of = sample_rows(weight, GROUP), candidate_scales(weight, seen.mean, GROUP, None)
    looks = []

    def losses_of(alphas):
        looks.extend(alphas)
        losses = [candidate_loss(sample, seen.moment, row, GROUP, k) for k in scales_of(alphas)]
        return torch.stack(losses)

    alpha, loss = search_alpha(losses_of)
    assert len(looks) == len(set(looks)) <= 10
    every = losses_of([step / ALPHA_STEPS for step in range(ALPHA_STEPS + 1)]).tolist()
    assert loss == min(every)
    assert alpha == min(range(ALPHA_STEPS + 1), key=lambda step: every[step]) / ALPHA_STEPS


@pytest.mark.parametrize("linear", SHAPES)
def test_the_scale_is_the_best_of_all_once_maxima_are_clipped(linear, layer):
    row, weight, seen = FORMATS["int4_awq"], weights()[linear], layer[0][linear]
    alphas = [step / ALPHA_STEPS for step in range(ALPHA_STEPS + 1)]
    scales = candidate_scales(weight, seen.mean, GROUP, None)(alphas)
    every = {}
    for step, pre_quant_scale in enumerate(scales):
        amax = clip_amax(weight, pre_quant_scale, seen.moment, row, GROUP)
        every[step / ALPHA_STEPS] = make_scales(
            weight, seen, row, GROUP, pre_quant_scale, amax=amax
        ).error
    found = awq(weight, seen, row, GROUP)
    assert found.alpha == min(every, key=lambda alpha: every[alpha])
    assert found.error == min(every.values())


@pytest.mark.parametrize("best", range(ALPHA_STEPS + 1))
def test_every_valley_over_the_exponent_is_found(best):
    looks = []

    def losses_of(alphas):
        looks.extend(alphas)
        return (torch.tensor(alphas, dtype=torch.float64) - best / ALPHA_STEPS).abs()

    alpha, loss = search_alpha(losses_of)
    assert alpha == best / ALPHA_STEPS and float(loss) == 0
    assert len(looks) <= 10


def test_no_scaling_is_kept_where_no_exponent_is_better(layer):
    seen = layer[0]["linear_qkv"]
    flat = replace(seen, mean=torch.logspace(0, 3, 128), moment=torch.eye(128), modalities={})
    weight = torch.ones(256, 128) * torch.tensor([7.0, 1, 2, 3, -4, 5, -6, 3]).repeat(16)
    scales = awq(weight, flat, FORMATS["int4_awq"], 32)
    assert scales.alpha is None and scales.error == 0
    assert torch.equal(scales.pre_quant_scale, torch.ones(128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_takes_the_amax_of_least_cost_in_each_group(dtype, layer, monkeypatch):
    monkeypatch.setattr(clip_module, "CHUNK", 50 * 128)
    row, weight, seen = FORMATS["int4_awq"], weights(dtype)["linear_qkv"], layer[0]["linear_qkv"]
    pre_quant_scale = candidate_scales(weight, seen.mean, GROUP, None)([0.4])[0]
    found = clip_amax(weight, pre_quant_scale, seen.moment, row, GROUP)
    smooth, plain = (
        divide_by_pre_quant_scale(weight, pre_quant_scale),
        weight_amax(divide_by_pre_quant_scale(weight, pre_quant_scale), "group", GROUP),
    )
    cost_of = {}
    for ratio in CLIP_RATIOS:
        tried = round_amax(plain * ratio, dtype)
        moved = (fake_quantize(smooth, tried, "int4") - smooth.float()).double() * pre_quant_scale
        blocks = [
            torch.einsum("oi,ij,oj->o", part, seen.moment.double()[i : i + 32, i : i + 32], part)
            for i, part in zip(range(0, 128, 32), moved.split(32, dim=1), strict=True)
        ]
        cost_of[ratio] = torch.stack(blocks, dim=1)
    least = torch.stack(list(cost_of.values())).amin(dim=0)
    own = torch.full_like(least, torch.inf)
    for ratio, cost in cost_of.items():
        own = torch.where(found == round_amax(plain * ratio, dtype), torch.minimum(own, cost), own)
    torch.testing.assert_close(own, least, rtol=1e-4, atol=0)


def test_clip_that_makes_the_whole_loss_larger_is_not_kept(layer, monkeypatch):
    weight, seen, row = weights()["linear_qkv"], layer[0]["linear_qkv"], FORMATS["int4_awq"]

    def halved(weight, pre_quant_scale, *_):
        return weight_amax(divide_by_pre_quant_scale(weight, pre_quant_scale), "group", GROUP) / 4

    monkeypatch.setattr(awq_module, "clip", halved)
    scales = awq(weight, seen, row, GROUP)
    plain = weight_amax(divide_by_pre_quant_scale(weight, scales.pre_quant_scale), "group", GROUP)
    assert torch.equal(scales.weight_amax, plain)


@pytest.mark.parametrize("name", ["fp8", "int8_sq", "w4a8_awq", "nvfp4_svdquant"])
def test_maxima_and_errors_do_not_depend_on_where_rows_are_cut(name, layer, monkeypatch):
    expected, row = solved(name, layer), FORMATS[name]
    monkeypatch.setattr(losses.row_chunks, "__defaults__", (100 * 128,))
    for linear, one in expected.items():
        given = (weights()[linear], layer[0][linear], row, row.group(GROUP), one.pre_quant_scale)
        amax = one.weight_amax if row.granularity == "group" else None
        cut = make_scales(*given, branch=one.branch, amax=amax)
        assert all(torch.equal(cut.tensors()[key], t) for key, t in one.tensors().items()), linear
        assert cut.error == pytest.approx(one.error, rel=1e-5)


def test_a_sample_of_the_rows_finds_the_scale_of_all(layer):
    """Rows differ a hundredfold in size: a sample that took no account of it would miss them."""
    torch.manual_seed(3)
    seen, row = layer[0]["linear_fc1"], FORMATS["int4_awq"]
    weight = torch.randn(1024, 128) * torch.exp(1.5 * torch.randn(1024, 1))
    weight = weight * torch.exp(torch.randn(128) / 2)
    every = sample_rows(weight, GROUP)
    some = sample_rows(weight, GROUP, 256)
    assert len(some.weight_NK) == 256 and len(set(some.rows_N.tolist())) == 256
    assert float(some.count_N.sum()) == pytest.approx(1024)
    assert torch.equal(some.top_K, weight.abs().amax(dim=0))
    scales = candidate_scales(weight, seen.mean, GROUP, None)(
        [s / ALPHA_STEPS for s in range(ALPHA_STEPS + 1)]
    )
    loss = {
        len(one.weight_NK): [candidate_loss(one, seen.moment, row, GROUP, k) for k in scales]
        for one in (every, some)
    }
    ratios = [float(a / b) for a, b in zip(loss[256], loss[1024], strict=True)]
    assert max(abs(ratio - 1) for ratio in ratios) < 0.03
    chosen = min(range(ALPHA_STEPS + 1), key=lambda step: loss[256][step])
    assert loss[1024][chosen] <= 1.01 * min(loss[1024])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_input_noise_in_closed_form_is_that_of_rounding_the_inputs(alpha):
    torch.manual_seed(1)
    x = torch.randn(20000, 64) * torch.exp(torch.randn(64) / 2)
    weight = torch.randn(96, 64)
    scale = smoothing_scale(weight.abs().amax(dim=0), x.abs().amax(dim=0), alpha)
    smooth, given = weight / scale, (x * scale).double()
    step = given.abs().amax() / 127
    moved = (given / step).round() * step - given
    replayed = float((moved @ smooth.double().T).square().sum(1).mean())
    told = float(input_noise(given.abs().amax()) * smooth.double().square().sum())
    assert told == pytest.approx(replayed, rel=0.05)


@pytest.mark.parametrize("linear", SHAPES)
def test_the_searched_exponent_of_smoothquant_is_the_best_when_tokens_are_replayed(linear, layer):
    row, weight, seen = FORMATS["int8_sq"], weights()[linear], layer[0][linear]
    x = torch.cat(list(layer[1][linear].values())).double()

    def replayed(alpha):
        scales = smoothquant(weight, seen, row, alpha)
        given = x * scales.pre_quant_scale
        step = scales.input_amax.double() / 127
        rounded = (given / step).round().clamp(-128, 127) * step
        smooth = fake_quantize(
            divide_by_pre_quant_scale(weight, scales.pre_quant_scale), scales.weight_amax, "int8"
        ).double()
        return float((rounded @ smooth.T - x @ weight.double().T).square().sum())

    found = smoothquant(weight, seen, row, "search")
    every = {step / ALPHA_STEPS: replayed(step / ALPHA_STEPS) for step in range(ALPHA_STEPS + 1)}
    assert every[found.alpha] <= 1.05 * min(every.values())
    assert every[found.alpha] < every[1.0]


def test_a_given_exponent_of_smoothquant_is_taken(layer):
    for alpha in (0.0, 0.5, 1.0):
        found = solved("int8_sq", layer, wishes=SolveOptions(smoothquant_alpha=alpha))
        for linear, scales in found.items():
            top, act = weights()[linear].abs().amax(0), layer[0][linear].amax
            expected = (top.pow(1 - alpha) / act.pow(alpha)).clamp(1e-4, 1e4)
            assert scales.alpha == alpha
            assert torch.equal(scales.pre_quant_scale, expected)


@pytest.mark.parametrize("name", ["int4_awq", "w4a8_awq", "nvfp4_awq", "nvfp4_svdquant"])
def test_query_heads_share_the_scale_before_o_proj_where_an_export_folds_it(name, layer):
    pre_quant_scale = solved(name, layer)["linear_proj"].pre_quant_scale.reshape(4, 2, 16)
    folds = "compressed_tensors" in FORMATS[name].targets
    assert torch.equal(pre_quant_scale[:, 0], pre_quant_scale[:, 1]) == folds
    assert len(pre_quant_scale.unique()) > 8


@pytest.mark.parametrize("rank", [8, 32])
def test_directions_are_the_strongest_singular_vectors(rank):
    """All of a matrix of that rank; of one with a slow decay as much as the exact ones hold."""
    torch.manual_seed(2)
    low, pre_quant_scale = torch.randn(300, rank) @ torch.randn(rank, 128), torch.rand(128) + 0.5
    for weight, part in (
        (low * pre_quant_scale, 1e-4),
        (torch.randn(300, 128) * pre_quant_scale, 0.02),
    ):
        smooth = weight / pre_quant_scale
        a, b = low_rank_factors(smooth, direction_finder(weight, rank)(pre_quant_scale))
        assert a.shape == (rank, 128) and b.shape == (300, rank)
        torch.testing.assert_close(a @ a.T, torch.eye(rank), rtol=0, atol=1e-4)
        assert bool((a.gather(1, a.abs().argmax(dim=1, keepdim=True)) > 0).all())
        u, s, vt = torch.linalg.svd(smooth)
        exact = (u[:, :rank] * s[:rank]) @ vt[:rank]
        missed = (smooth - b @ a).square().sum() - (smooth - exact).square().sum()
        assert float(missed) <= part * float(exact.square().sum())
