"""Solve: reported errors against replayed tokens, image shares, nf4, sharding and files."""

import pytest
import torch
from safetensors.torch import load_file
from solving import (
    GROUP_SIZE,
    SHAPES,
    SIZES,
    TOKEN_COUNTS,
    layer_entries,
    make_weights,
    observe_tokens,
    solve,
)

from nemo_vlm_ptq.calibrate.solve.fake_quantize import fake_quantize_weight
from nemo_vlm_ptq.calibrate.solve.layer import (
    SolveOptions,
    double_quantize_absmax,
    load_kv_amax,
    load_scales,
    save_scales,
    solve_layer,
)
from nemo_vlm_ptq.calibrate.solve.linear_scales import shard_scales
from nemo_vlm_ptq.calibrate.solve.modality_balance import IMAGE_SHARES
from nemo_vlm_ptq.calibrate.solve.scales import (
    divide_by_pre_quant_scale,
    residual_weight,
    round_amax,
)
from nemo_vlm_ptq.calibrate.statistics import InputStatistics, load_observed_kv_amax
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.numerics import (
    dequantize_nf4_absmax,
    fake_quantize,
    quantize_nf4_absmax,
    weight_amax,
)
from nemo_vlm_ptq.parameter_map.sharding import shard_tensor, unshard_tensor
from nemo_vlm_ptq.utils.prefetch import prefetch_to_device


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """(statistics, tokens) of a layer observed on text and images."""
    return observe_tokens(tmp_path_factory.mktemp("statistics"))


def effective_weight(weight, scales, fmt):
    """Return the weight that multiplies the unscaled input, float64, from numerics alone."""
    smooth = divide_by_pre_quant_scale(weight, scales.pre_quant_scale)
    effective = fake_quantize(
        residual_weight(smooth, scales.branch), scales.weight_amax, fmt.weight
    )
    if fmt.second_weight is not None:
        effective = fake_quantize(effective, scales.weight_amax_2, fmt.second_weight)
    effective = effective.double()
    if scales.branch is not None:
        a, b = scales.branch
        effective = effective + b.double() @ a.double()
    if scales.pre_quant_scale is not None:
        effective = effective * scales.pre_quant_scale.double()
    return effective


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_fake_quantize_weight_equals_numerics_bit_for_bit(name, dtype):
    fmt, weight = FORMATS[name], make_weights(dtype)["linear_fc1"].clone()
    weight[:, :GROUP_SIZE] = 0  # groups and a row without magnitude
    weight[3] = 0
    for ratio in (1.0, 0.6):
        plain = weight_amax(weight, fmt.granularity, fmt.group(GROUP_SIZE))
        amax = round_amax(plain * ratio, dtype)
        amax_2 = None if fmt.second_weight is None else weight.float().abs().amax()
        expected = fake_quantize(weight, amax, fmt.weight)
        if amax_2 is not None:
            expected = fake_quantize(expected, amax_2, fmt.second_weight)
        assert torch.equal(fake_quantize_weight(weight, amax, fmt, amax_2), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_reported_errors_equal_those_of_replayed_tokens(name, dtype, layer):
    tokens, weights = layer[1], make_weights(dtype)
    for linear, scales in solve(name, layer, dtype).items():
        weight = weights[linear].double()
        delta = effective_weight(weights[linear], scales, FORMATS[name]) - weight
        x = {modality: part.double() for modality, part in tokens[linear].items()}
        for part, error in (
            (torch.cat(list(x.values())), scales.error),
            (x["text"], scales.error_text),
            (x["image"], scales.error_image),
        ):
            ratio = (part @ delta.T).square().sum() / (part @ weight.T).square().sum()
            assert error == pytest.approx(float(ratio.sqrt()), rel=1e-3), (linear, scales.alpha)


@pytest.mark.parametrize("name", FORMATS)
def test_solving_does_not_modify_weights_or_statistics(name, layer):
    weights, statistics = make_weights(), layer[0]
    before = {linear: found.moment.whole_KK.clone() for linear, found in statistics.items()}
    entries = layer_entries("llava")
    solve_layer(weights, statistics, FORMATS[name], GROUP_SIZE, SIZES, parameter_map=entries)
    assert all(torch.equal(weights[linear], w) for linear, w in make_weights().items())
    assert all(torch.equal(statistics[linear].moment.whole_KK, m) for linear, m in before.items())


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].algorithm != "awq"])
def test_without_second_moments_scales_are_equal_and_errors_are_none(name, layer):
    bare = {
        linear: InputStatistics(
            amax=found.amax, abs_mean=found.abs_mean, tokens=found.tokens, moment=None
        )
        for linear, found in layer[0].items()
    }
    for linear, scales in solve(name, (bare,)).items():
        expected = solve(name, layer)[linear].tensors()
        assert all(torch.equal(scales.tensors()[key], t) for key, t in expected.items())
        assert (scales.error, scales.error_text, scales.error_image) == (None, None, None)


def test_statistics_match_the_tokens_of_each_modality_and_of_both(layer):
    statistics, tokens = layer
    for linear, overall in statistics.items():
        x = tokens[linear] | {"both": torch.cat(list(tokens[linear].values()))}
        found = dict(overall.modalities) | {"both": overall}
        for key, part in x.items():
            assert found[key].tokens == len(part)
            abs_mean = part.abs().mean(0)
            torch.testing.assert_close(found[key].abs_mean, abs_mean, rtol=1e-5, atol=1e-7)
            expected = (part.double().T @ part.double() / len(part)).float()
            torch.testing.assert_close(found[key].moment.whole_KK, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(overall.amax, x["both"].abs().amax(0))
        assert overall.image_share == 300 / 360


@pytest.mark.parametrize("image_share", [0.0, 0.25, 1.0])
def test_an_image_share_interpolates_the_means_of_text_and_images(image_share, layer):
    observed = layer[0]["linear_fc2"]
    text, image = observed.modalities.values()
    weighted = observed.with_image_share(image_share)
    for get in (lambda s: s.abs_mean, lambda s: s.moment.whole_KK, lambda s: s.moment.blocks_Ggg):
        expected = image_share * get(image) + (1 - image_share) * get(text)
        torch.testing.assert_close(get(weighted), expected)
    assert weighted.amax is observed.amax
    unchanged = observed.with_image_share(observed.image_share)
    torch.testing.assert_close(
        unchanged.moment.whole_KK, observed.moment.whole_KK, rtol=1e-5, atol=1e-5
    )
    assert observed.with_image_share(None) is observed


def observe_without(modality, tmp_path):
    counts = {key: count for key, count in TOKEN_COUNTS.items() if key != modality}
    return observe_tokens(tmp_path, counts)


@pytest.mark.parametrize("name", ["int4_awq", "nvfp4_svdquant"])
def test_image_share_one_solves_as_if_there_were_only_images(name, layer, tmp_path):
    """Except for input_amax, which covers all tokens."""
    images_only = observe_without("text", tmp_path)[0]
    expected = solve_layer(make_weights(), images_only, FORMATS[name], GROUP_SIZE, SIZES)
    for linear, scales in solve(name, layer, options=SolveOptions(image_share=1.0)).items():
        for key in set(scales.tensors()) - {"input_amax"}:
            assert torch.equal(scales.tensors()[key], expected[linear].tensors()[key]), key
        assert (scales.image_share, expected[linear].image_share) == (1.0, None)
        assert scales.error_image == pytest.approx(expected[linear].error)


@pytest.mark.parametrize("modality", TOKEN_COUNTS)
@pytest.mark.parametrize("image_share", [0.5, "search"])
def test_an_image_share_has_no_effect_if_a_modality_is_missing(modality, image_share, tmp_path):
    statistics, _ = observe_without(modality, tmp_path)
    layer_inputs = (make_weights(), statistics, FORMATS["int4_awq"], GROUP_SIZE, SIZES)
    expected = solve_layer(*layer_inputs)
    found = solve_layer(*layer_inputs, SolveOptions(image_share=image_share))
    for linear, scales in found.items():
        for key, tensor in expected[linear].tensors().items():
            assert torch.equal(scales.tensors()[key], tensor)
        assert getattr(scales, f"error_{modality}") is None and scales.image_share is None


@pytest.mark.parametrize("name", ["int4_awq", "nvfp4_awq", "int8_sq"])
def test_the_searched_image_share_minimizes_the_error_of_the_worse_modality(name, layer):
    def solve_at(image_share):
        options = SolveOptions(smoothquant_alpha="search", image_share=image_share)
        return solve(name, layer, options=options)

    def worst_errors(scales):
        return {linear: max(s.error_text, s.error_image) for linear, s in scales.items()}

    candidates = [worst_errors(solve_at(image_share)) for image_share in IMAGE_SHARES]
    found = solve_at("search")
    for linear, error in worst_errors(found).items():
        assert error == min(candidate[linear] for candidate in candidates)
        assert found[linear].image_share in (*IMAGE_SHARES, 300 / 360)


def test_an_image_share_does_not_affect_formats_without_a_search(layer):
    for name in ("fp8", "int4_wo", "int8_sq"):
        expected = solve(name, layer)
        for linear, scales in solve(name, layer, options=SolveOptions(image_share=0.0)).items():
            for key, tensor in expected[linear].tensors().items():
                assert torch.equal(scales.tensors()[key], tensor)
            assert scales.image_share is None


def test_svdquant_quantizes_a_smaller_residual_than_awq(layer):
    awq_scales, svdquant_scales = solve("nvfp4_awq", layer), solve("nvfp4_svdquant", layer)
    for linear, scales in svdquant_scales.items():
        a, b = scales.branch
        rows, width = SHAPES[linear]
        assert a.shape == (32, width) and b.shape == (rows, 32)
        smooth = divide_by_pre_quant_scale(make_weights()[linear], scales.pre_quant_scale)
        residual = residual_weight(smooth, scales.branch)
        assert torch.equal(scales.weight_amax, residual.abs().amax())
        assert scales.error < 0.9 * awq_scales[linear].error


def test_the_residual_of_a_shard_has_the_bits_of_the_whole_residual(layer):
    for linear, scales in solve("nvfp4_svdquant", layer, torch.bfloat16).items():
        (sharding,) = (e.sharding for e in layer_entries("llava") if e.module_name == linear)
        whole = make_weights(torch.bfloat16)[linear]
        residual = residual_weight(
            divide_by_pre_quant_scale(whole, scales.pre_quant_scale), scales.branch
        )
        hf_weights, hf_residuals = (unshard_tensor(sharding, t, SIZES) for t in (whole, residual))
        for T in (2, 4):
            for t in range(T):
                shard = shard_scales(scales, linear, t, T)
                weight = shard_tensor(sharding, hf_weights, SIZES, t, T)
                expected = shard_tensor(sharding, hf_residuals, SIZES, t, T)
                smooth = divide_by_pre_quant_scale(weight, shard.pre_quant_scale)
                assert torch.equal(residual_weight(smooth, shard.branch), expected), (linear, t, T)


@pytest.mark.parametrize("family", ["llava", "phi"])
def test_nf4_absmaxes_are_double_quantized_per_hugging_face_tensor(family):
    weights = make_weights(torch.bfloat16)
    for entry in (entry for entry in layer_entries(family) if entry.is_linear):
        weight = weights[entry.module_name]
        found = double_quantize_absmax(weight_amax(weight, "group", 64), entry, SIZES)
        parts = unshard_tensor(entry.sharding, weight, SIZES)
        hf_tensors = [torch.cat(parts)] if family == "phi" else parts
        assert len(hf_tensors) == len(entry.hf_names)
        expected = []
        for tensor in hf_tensors:
            absmax = tensor.float().flatten().view(-1, 64).abs().amax(dim=1)
            dequantized = dequantize_nf4_absmax(*quantize_nf4_absmax(absmax))
            expected.append(dequantized.view(len(tensor), -1))
        hf_found = torch.cat(unshard_tensor(entry.sharding, found, SIZES))
        assert torch.equal(hf_found, torch.cat(expected))


def test_scales_and_kv_amax_survive_a_round_trip_through_their_file(layer, tmp_path):
    scales = solve("nvfp4_svdquant", layer, torch.bfloat16)
    observe_tokens(tmp_path)
    kv_amax = tuple(round_amax(amax, torch.bfloat16) for amax in load_observed_kv_amax(tmp_path, 0))
    name = save_scales(tmp_path, 5, scales, kv_amax)
    assert {"linear_qkv.prequant", "linear_qkv.low_rank_a"} < set(load_file(tmp_path / name))
    for linear, loaded in load_scales(tmp_path, 5).items():
        assert set(loaded.tensors()) == set(scales[linear].tensors())
        for key, tensor in loaded.tensors().items():
            assert torch.equal(scales[linear].tensors()[key], tensor)
    key, value = load_kv_amax(tmp_path, 5)
    assert key.shape == value.shape == ()
    assert (float(key), float(value)) == (3.296875, 0.69921875)  # nearest bfloat16


def test_prefetch_to_device_preserves_order_and_loads_one_item_in_advance():
    loaded = []

    def load(item):
        loaded.append(item)
        return 10 * item

    found = []
    for item, value in prefetch_to_device(range(5), load, torch.device("cpu")):
        found.append((item, value))
        assert max(loaded, default=0) <= item + 1
    assert found == [(i, 10 * i) for i in range(5)] and loaded == list(range(5))


def test_prefetch_to_device_raises_errors_of_the_loader():
    def load(item):
        if item == 2:
            raise OSError("gone")
        return item

    with pytest.raises(OSError, match="gone"):
        list(prefetch_to_device(range(4), load, torch.device("cpu")))
