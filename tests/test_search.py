"""Searches of solve against brute force over all candidates."""

from dataclasses import replace

import pytest
import torch
from solving import GROUP_SIZE, SHAPES, make_weights, observe_tokens, solve

from nemo_vlm_ptq.calibrate import losses
from nemo_vlm_ptq.calibrate.input_moment import InputMoment
from nemo_vlm_ptq.calibrate.solve import awq as awq_module
from nemo_vlm_ptq.calibrate.solve import clipping
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
from nemo_vlm_ptq.calibrate.solve.svdquant import low_rank_factors, singular_vector_solver
from nemo_vlm_ptq.calibrate.statistics import ModalityStatistics
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.numerics import fake_quantize, weight_amax
from nemo_vlm_ptq.targets.registry import supported_targets

ALPHAS = [step / ALPHA_STEPS for step in range(ALPHA_STEPS + 1)]


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """(statistics, tokens) of a layer observed on text and images."""
    return observe_tokens(tmp_path_factory.mktemp("statistics"))


@pytest.mark.parametrize("name", ["int4_awq", "w4a8_awq", "nvfp4_awq", "nvfp4_svdquant"])
def test_awq_has_smaller_errors_than_max(name, layer):
    max_format = {"int4_awq": "int4_wo", "w4a8_awq": "int4_wo"}.get(name, "nvfp4")
    awq_scales, max_scales = solve(name, layer), solve(max_format, layer)
    for linear, scales in awq_scales.items():
        assert scales.error < 0.95 * max_scales[linear].error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("linear", SHAPES)
def test_coarse_to_fine_search_finds_the_best_of_all_exponents(linear, dtype, layer):
    fmt, weight, statistics = FORMATS["int4_awq"], make_weights(dtype)[linear], layer[0][linear]
    sample = sample_rows(weight, GROUP_SIZE)
    compute_scales = candidate_scales(weight, statistics.abs_mean, GROUP_SIZE, None)
    evaluated = []

    def compute_losses(alphas):
        evaluated.extend(alphas)
        candidates = [
            candidate_loss(sample, statistics.moment, fmt, GROUP_SIZE, scale)
            for scale in compute_scales(alphas)
        ]
        return torch.stack(candidates)

    alpha, loss = search_alpha(compute_losses)
    assert len(evaluated) == len(set(evaluated)) <= 10
    all_losses = compute_losses(ALPHAS).tolist()
    assert loss == min(all_losses)
    assert alpha == ALPHAS[min(range(len(ALPHAS)), key=lambda step: all_losses[step])]


@pytest.mark.parametrize("linear", SHAPES)
def test_awq_finds_the_best_scale_after_clipping(linear, layer):
    fmt, weight, statistics = FORMATS["int4_awq"], make_weights()[linear], layer[0][linear]
    scales = candidate_scales(weight, statistics.abs_mean, GROUP_SIZE, None)(ALPHAS)
    errors = {}
    for alpha, pre_quant_scale in zip(ALPHAS, scales, strict=True):
        amax = clip_amax(weight, pre_quant_scale, statistics.moment, fmt, GROUP_SIZE)
        errors[alpha] = make_scales(
            weight, statistics, fmt, GROUP_SIZE, pre_quant_scale, amax=amax
        ).error
    found = awq(weight, statistics, fmt, GROUP_SIZE)
    assert found.alpha == min(errors, key=lambda alpha: errors[alpha])
    assert found.error == min(errors.values())


@pytest.mark.parametrize("best", range(ALPHA_STEPS + 1))
def test_search_alpha_finds_a_single_minimum_anywhere(best):
    evaluated = []

    def compute_losses(alphas):
        evaluated.extend(alphas)
        return (torch.tensor(alphas, dtype=torch.float64) - best / ALPHA_STEPS).abs()

    alpha, loss = search_alpha(compute_losses)
    assert alpha == best / ALPHA_STEPS and float(loss) == 0
    assert len(evaluated) <= 10


def test_awq_uses_a_scale_of_one_if_no_exponent_is_better(layer):
    observed = layer[0]["linear_qkv"]
    moment = InputMoment(whole_KK=torch.eye(128), blocks_Ggg=torch.eye(128)[None])
    modalities = {"text": ModalityStatistics(observed.tokens, observed.abs_mean, moment)}
    uncorrelated = replace(
        observed, abs_mean=torch.logspace(0, 3, 128), moment=moment, modalities=modalities
    )
    weight = torch.ones(256, 128) * torch.tensor([7.0, 1, 2, 3, -4, 5, -6, 3]).repeat(16)
    scales = awq(weight, uncorrelated, FORMATS["int4_awq"], 32)
    assert scales.alpha is None and scales.error == 0
    assert torch.equal(scales.pre_quant_scale, torch.ones(128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_amax_has_the_least_cost_in_each_group(dtype, layer, monkeypatch):
    monkeypatch.setattr(clipping, "CLIP_CHUNK_ELEMENTS", 50 * 128)
    fmt, weight = FORMATS["int4_awq"], make_weights(dtype)["linear_qkv"]
    statistics = layer[0]["linear_qkv"]
    second_moment = statistics.moment.whole_KK.double()
    pre_quant_scale = candidate_scales(weight, statistics.abs_mean, GROUP_SIZE, None)([0.4])[0]
    found = clip_amax(weight, pre_quant_scale, statistics.moment, fmt, GROUP_SIZE)
    smooth = divide_by_pre_quant_scale(weight, pre_quant_scale)
    plain = weight_amax(smooth, "group", GROUP_SIZE)
    cost_of = {}
    for ratio in CLIP_RATIOS:
        amax = round_amax(plain * ratio, dtype)
        delta = (fake_quantize(smooth, amax, "int4") - smooth.float()).double() * pre_quant_scale
        group_costs = [
            torch.einsum("oi,ij,oj->o", part, second_moment[i : i + 32, i : i + 32], part)
            for i, part in zip(range(0, 128, 32), delta.split(32, dim=1), strict=True)
        ]
        cost_of[ratio] = torch.stack(group_costs, dim=1)
    least = torch.stack(list(cost_of.values())).amin(dim=0)
    found_cost = torch.full_like(least, torch.inf)
    for ratio, cost in cost_of.items():
        is_found = found == round_amax(plain * ratio, dtype)
        found_cost = torch.where(is_found, torch.minimum(found_cost, cost), found_cost)
    torch.testing.assert_close(found_cost, least, rtol=1e-4, atol=0)


def test_awq_discards_clipping_that_increases_the_loss_of_the_weight(layer, monkeypatch):
    weight, statistics = make_weights()["linear_qkv"], layer[0]["linear_qkv"]

    def clip_too_much(weight, pre_quant_scale, *_):
        smooth = divide_by_pre_quant_scale(weight, pre_quant_scale)
        return weight_amax(smooth, "group", GROUP_SIZE) / 4

    monkeypatch.setattr(awq_module, "clip_amax", clip_too_much)
    scales = awq(weight, statistics, FORMATS["int4_awq"], GROUP_SIZE)
    smooth = divide_by_pre_quant_scale(weight, scales.pre_quant_scale)
    assert torch.equal(scales.weight_amax, weight_amax(smooth, "group", GROUP_SIZE))


@pytest.mark.parametrize("name", ["fp8", "int8_sq", "w4a8_awq", "nvfp4_svdquant"])
def test_amax_and_errors_do_not_depend_on_row_chunks(name, layer, monkeypatch):
    expected, fmt = solve(name, layer), FORMATS[name]
    monkeypatch.setattr(losses.row_chunks, "__defaults__", (100 * 128,))
    for linear, whole in expected.items():
        chunked = make_scales(
            make_weights()[linear],
            layer[0][linear],
            fmt,
            fmt.group(GROUP_SIZE),
            whole.pre_quant_scale,
            branch=whole.branch,
            amax=whole.weight_amax if fmt.granularity == "group" else None,
        )
        for key, tensor in whole.tensors().items():
            assert torch.equal(chunked.tensors()[key], tensor), (linear, key)
        assert chunked.error == pytest.approx(whole.error, rel=1e-5)


def test_a_row_sample_selects_nearly_the_same_scale_as_all_rows(layer):
    """Row magnitudes vary by a factor of a hundred, which a uniform sample would miss."""
    torch.manual_seed(3)
    statistics, fmt = layer[0]["linear_fc1"], FORMATS["int4_awq"]
    weight = torch.randn(1024, 128) * torch.exp(1.5 * torch.randn(1024, 1))
    weight = weight * torch.exp(torch.randn(128) / 2)
    all_rows = sample_rows(weight, GROUP_SIZE)
    sample = sample_rows(weight, GROUP_SIZE, 256)
    assert len(sample.weight_NK) == 256 and len(set(sample.rows_N.tolist())) == 256
    assert float(sample.count_N.sum()) == pytest.approx(1024)
    assert torch.equal(sample.amax_K, weight.abs().amax(dim=0))
    scales = candidate_scales(weight, statistics.abs_mean, GROUP_SIZE, None)(ALPHAS)
    sample_losses, all_losses = (
        [candidate_loss(rows, statistics.moment, fmt, GROUP_SIZE, k) for k in scales]
        for rows in (sample, all_rows)
    )
    ratios = [float(a / b) for a, b in zip(sample_losses, all_losses, strict=True)]
    assert max(abs(ratio - 1) for ratio in ratios) < 0.03
    chosen = min(range(len(ALPHAS)), key=lambda step: sample_losses[step])
    assert all_losses[chosen] <= 1.01 * min(all_losses)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_input_noise_matches_the_measured_noise_of_quantized_inputs(alpha):
    torch.manual_seed(1)
    x = torch.randn(20000, 64) * torch.exp(torch.randn(64) / 2)
    weight = torch.randn(96, 64)
    scale = smoothing_scale(weight.abs().amax(dim=0), x.abs().amax(dim=0), alpha)
    smooth, scaled_x = weight / scale, (x * scale).double()
    amax = scaled_x.abs().amax()
    step = amax / 127
    delta_x = (scaled_x / step).round() * step - scaled_x
    measured = float((delta_x @ smooth.double().T).square().sum(1).mean())
    estimated = float(input_noise(amax) * smooth.double().square().sum())
    assert estimated == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("linear", SHAPES)
def test_smoothquant_search_finds_nearly_the_best_exponent_over_replayed_tokens(linear, layer):
    fmt, weight, statistics = FORMATS["int8_sq"], make_weights()[linear], layer[0][linear]
    x = torch.cat(list(layer[1][linear].values())).double()

    def replay(alpha):
        scales = smoothquant(weight, statistics, fmt, alpha)
        scaled_x = x * scales.pre_quant_scale
        step = scales.input_amax.double() / 127
        quantized_x = (scaled_x / step).round().clamp(-128, 127) * step
        smooth = divide_by_pre_quant_scale(weight, scales.pre_quant_scale)
        quantized_weight = fake_quantize(smooth, scales.weight_amax, "int8").double()
        delta = quantized_x @ quantized_weight.T - x @ weight.double().T
        return float(delta.square().sum())

    found = smoothquant(weight, statistics, fmt, "search")
    replayed = {alpha: replay(alpha) for alpha in ALPHAS}
    assert replayed[found.alpha] <= 1.05 * min(replayed.values())
    assert replayed[found.alpha] < replayed[1.0]


def test_smoothquant_uses_the_exponent_of_the_recipe(layer):
    for alpha in (0.0, 0.5, 1.0):
        found = solve("int8_sq", layer, options=SolveOptions(smoothquant_alpha=alpha))
        for linear, scales in found.items():
            weight_amax_K = make_weights()[linear].abs().amax(0)
            input_amax_K = layer[0][linear].amax
            expected = (weight_amax_K.pow(1 - alpha) / input_amax_K.pow(alpha)).clamp(1e-4, 1e4)
            assert scales.alpha == alpha
            assert torch.equal(scales.pre_quant_scale, expected)


@pytest.mark.parametrize("name", ["int4_awq", "w4a8_awq", "nvfp4_awq", "nvfp4_svdquant"])
def test_query_heads_of_a_kv_head_share_the_o_proj_scale_if_an_export_folds_it(name, layer):
    pre_quant_scale = solve(name, layer)["linear_proj"].pre_quant_scale.reshape(4, 2, 16)
    are_equal = torch.equal(pre_quant_scale[:, 0], pre_quant_scale[:, 1])
    assert are_equal == ("compressed_tensors" in supported_targets(FORMATS[name]))
    assert len(pre_quant_scale.unique()) > 8


@pytest.mark.parametrize("rank", [8, 32])
def test_the_low_rank_branch_matches_the_truncated_svd(rank):
    """A matrix of that rank is recovered; with slow decay, little of the exact part is missed."""
    torch.manual_seed(2)
    low_rank = torch.randn(300, rank) @ torch.randn(rank, 128)
    pre_quant_scale = torch.rand(128) + 0.5
    for weight, tolerance in (
        (low_rank * pre_quant_scale, 1e-4),
        (torch.randn(300, 128) * pre_quant_scale, 0.02),
    ):
        smooth = weight / pre_quant_scale
        a, b = low_rank_factors(smooth, singular_vector_solver(weight, rank)(pre_quant_scale))
        assert a.shape == (rank, 128) and b.shape == (300, rank)
        torch.testing.assert_close(a @ a.T, torch.eye(rank), rtol=0, atol=1e-4)
        assert bool((a.gather(1, a.abs().argmax(dim=1, keepdim=True)) > 0).all())
        u, s, vt = torch.linalg.svd(smooth)
        exact = (u[:, :rank] * s[:rank]) @ vt[:rank]
        missed = (smooth - b @ a).square().sum() - (smooth - exact).square().sum()
        assert float(missed) <= tolerance * float(exact.square().sum())
