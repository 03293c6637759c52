"""Solve: every format's error against replaying the tokens, shares of images, nf4, files."""

import pytest
import torch
from solving import GROUP, SHAPES, SIZES, TOKENS, observed, rows_of, solved, weights

from nemo_vlm_ptq.calibrate.solve.fake_quantize import fake_quantize_weight
from nemo_vlm_ptq.calibrate.solve.layer import (
    SolveOptions,
    double_quantize_absmax,
    load_kv,
    load_scales,
    save_scales,
    solve_layer,
)
from nemo_vlm_ptq.calibrate.solve.modality_balance import IMAGE_SHARES
from nemo_vlm_ptq.calibrate.solve.scales import (
    divide_by_pre_quant_scale,
    residual_weight,
    round_amax,
    shard_scales,
)
from nemo_vlm_ptq.calibrate.statistics import (
    InputStatistics,
    load_attention,
)
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.numerics import (
    dequantize_nf4_absmax,
    fake_quantize,
    quantize_nf4_absmax,
    weight_amax,
)
from nemo_vlm_ptq.parameter_map.sharding import shard_tensor, unshard_tensor
from nemo_vlm_ptq.utils.device_prefetch import prefetch_to_device


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """(statistics, tokens) of a layer that has seen text and images."""
    return observed(tmp_path_factory.mktemp("statistics"))


def read_weight(weight, scales, row):
    """The weight that a reader multiplies the plain input with, float64, by numerics alone."""
    pre_quant_scale = (
        torch.ones(weight.shape[1]) if scales.pre_quant_scale is None else scales.pre_quant_scale
    )
    left = residual_weight(divide_by_pre_quant_scale(weight, scales.pre_quant_scale), scales.branch)
    seen = fake_quantize(left, scales.weight_amax, row.weight)
    if row.second_weight is not None:
        seen = fake_quantize(seen, scales.weight_amax_2, row.second_weight)
    seen = seen.double()
    if scales.branch is not None:
        a, b = scales.branch
        seen = seen + b.double() @ a.double()
    return seen * pre_quant_scale.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_rounding_without_codes_is_bit_for_bit_the_round_trip_of_the_codes(name, dtype):
    row, weight = FORMATS[name], weights(dtype)["linear_fc1"].clone()
    weight[:, :GROUP] = 0  # groups and rows of nothing
    weight[3] = 0
    group = row.group(GROUP)
    for ratio in (1.0, 0.6):
        amax = round_amax(weight_amax(weight, row.granularity, group) * ratio, dtype)
        second = None if row.second_weight is None else weight.float().abs().amax()
        expected = fake_quantize(weight, amax, row.weight)
        if second is not None:
            expected = fake_quantize(expected, second, row.second_weight)
        assert torch.equal(fake_quantize_weight(weight, amax, row, second), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_errors_are_those_of_replaying_the_tokens(name, dtype, layer):
    given, own = layer[1], weights(dtype)
    for linear, scales in solved(name, layer, dtype).items():
        weight = own[linear].double()
        moved = read_weight(own[linear], scales, FORMATS[name]) - weight
        x = {kind: part.double() for kind, part in given[linear].items()}
        for part, told in (
            (torch.cat(list(x.values())), scales.error),
            (x["text"], scales.error_text),
            (x["image"], scales.error_image),
        ):
            ratio = (part @ moved.T).square().sum() / (part @ weight.T).square().sum()
            assert told == pytest.approx(float(ratio.sqrt()), rel=1e-3), (linear, scales.alpha)


@pytest.mark.parametrize("name", FORMATS)
def test_solving_leaves_weights_and_statistics_as_they_were(name, layer):
    own, seen = weights(), layer[0]
    before = {linear: one.moment.clone() for linear, one in seen.items()}
    solve_layer(own, seen, FORMATS[name], GROUP, SIZES, rows=rows_of("llava"))
    assert all(torch.equal(own[linear], one) for linear, one in weights().items())
    assert all(torch.equal(seen[linear].moment, one) for linear, one in before.items())


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].algorithm != "awq"])
def test_without_second_moments_scales_are_the_same_and_there_is_no_error(name, layer):
    bare = {
        linear: InputStatistics(one.amax, one.mean, one.tokens, None)
        for linear, one in layer[0].items()
    }
    for linear, scales in solved(name, (bare,)).items():
        expected = solved(name, layer)[linear].tensors()
        assert all(torch.equal(scales.tensors()[key], one) for key, one in expected.items())
        assert (scales.error, scales.error_text, scales.error_image) == (None, None, None)


def test_statistics_of_each_kind_of_token_and_of_both(layer):
    seen, given = layer
    for linear, one in seen.items():
        x = given[linear] | {"both": torch.cat(list(given[linear].values()))}
        found = dict(one.modalities) | {"both": one}
        for kind, part in x.items():
            assert found[kind].tokens == len(part)
            torch.testing.assert_close(found[kind].mean, part.abs().mean(0), rtol=1e-5, atol=1e-7)
            moment = (part.double().T @ part.double() / len(part)).float()
            torch.testing.assert_close(found[kind].moment, moment, rtol=1e-5, atol=1e-6)
        assert torch.equal(one.amax, x["both"].abs().amax(0))
        assert one.image_share == 300 / 360


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_mixes_means_of_images_and_text(share, layer):
    one = layer[0]["linear_fc2"]
    mixed, text, image = one.with_image_share(share), *one.modalities.values()
    for key in ("mean", "moment"):
        expected = share * getattr(image, key) + (1 - share) * getattr(text, key)
        torch.testing.assert_close(getattr(mixed, key), expected)
    assert mixed.amax is one.amax
    natural = one.with_image_share(one.image_share)
    torch.testing.assert_close(natural.moment, one.moment, rtol=1e-5, atol=1e-5)
    assert one.with_image_share(None) is one


def without(kind, tmp_path):
    return observed(tmp_path, {key: count for key, count in TOKENS.items() if key != kind})


@pytest.mark.parametrize("name", ["int4_awq", "nvfp4_svdquant"])
def test_share_one_solves_as_if_there_were_images_alone(name, layer, tmp_path):
    """But for the largest input, which is of all tokens."""
    alone = without("text", tmp_path)[0]
    expected = solve_layer(weights(), alone, FORMATS[name], GROUP, SIZES)
    for linear, scales in solved(name, layer, wishes=SolveOptions(image_share=1.0)).items():
        for key in set(scales.tensors()) - {"input_amax"}:
            assert torch.equal(scales.tensors()[key], expected[linear].tensors()[key]), key
        assert (scales.image_share, expected[linear].image_share) == (1.0, None)
        assert scales.error_image == pytest.approx(expected[linear].error)


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("share", [0.5, "search"])
def test_a_share_means_nothing_where_one_kind_of_token_is_missing(kind, share, tmp_path):
    seen, _ = without(kind, tmp_path)
    plain = solve_layer(weights(), seen, FORMATS["int4_awq"], GROUP, SIZES)
    found = solve_layer(
        weights(), seen, FORMATS["int4_awq"], GROUP, SIZES, SolveOptions(1.0, share)
    )
    for linear, scales in found.items():
        own, other = scales.tensors(), plain[linear].tensors()
        assert all(torch.equal(own[key], one) for key, one in other.items())
        assert getattr(scales, f"error_{kind}") is None and scales.image_share is None


@pytest.mark.parametrize("name", ["int4_awq", "nvfp4_awq", "int8_sq"])
def test_a_searched_share_serves_the_worse_served_tokens_best(name, layer):
    def worse(share):
        wishes = SolveOptions("search", share)
        found = solved(name, layer, wishes=wishes)
        return {linear: max(one.error_text, one.error_image) for linear, one in found.items()}

    tried = [worse(share) for share in IMAGE_SHARES]
    found = solved(name, layer, wishes=SolveOptions("search", "search"))
    for linear, least in worse("search").items():
        assert least == min(one[linear] for one in tried)
        assert found[linear].image_share in (*IMAGE_SHARES, 300 / 360)


def test_a_share_does_not_touch_formats_that_search_nothing(layer):
    for name in ("fp8", "int4_wo", "int8_sq"):
        wishes = SolveOptions(image_share=0.0)
        for linear, scales in solved(name, layer, wishes=wishes).items():
            own, other = scales.tensors(), solved(name, layer)[linear].tensors()
            assert all(torch.equal(own[key], one) for key, one in other.items())
            assert scales.image_share is None


def test_svdquant_leaves_less_to_round_than_awq(layer):
    plain, found = solved("nvfp4_awq", layer), solved("nvfp4_svdquant", layer)
    for linear, scales in found.items():
        a, b = scales.branch
        rows, width = SHAPES[linear]
        assert a.shape == (32, width) and b.shape == (rows, 32)
        left = residual_weight(
            divide_by_pre_quant_scale(weights()[linear], scales.pre_quant_scale), scales.branch
        )
        assert torch.equal(scales.weight_amax, left.abs().amax())
        assert scales.error < 0.9 * plain[linear].error


def test_a_cut_of_the_remainder_has_the_bits_of_the_whole(layer):
    for linear, scales in solved("nvfp4_svdquant", layer, torch.bfloat16).items():
        kind = next(row.sharding for row in rows_of("llava") if row.module_name == linear)
        whole = weights(torch.bfloat16)[linear]
        left = residual_weight(
            divide_by_pre_quant_scale(whole, scales.pre_quant_scale), scales.branch
        )
        for T in (2, 4):
            for t in range(T):
                own = shard_scales(scales, linear, t, T)
                part = shard_tensor(kind, unshard_tensor(kind, whole, SIZES), SIZES, t, T)
                expected = shard_tensor(kind, unshard_tensor(kind, left, SIZES), SIZES, t, T)
                found = residual_weight(
                    divide_by_pre_quant_scale(part, own.pre_quant_scale), own.branch
                )
                assert torch.equal(found, expected), (linear, t, T)


@pytest.mark.parametrize("family", ["llava", "phi"])
def test_nf4_absmaxes_go_through_double_quantization_one_hugging_face_tensor_after_another(family):
    own, rows = weights(torch.bfloat16), rows_of(family)
    for row in (row for row in rows if row.is_linear):
        weight = own[row.module_name]
        found = double_quantize_absmax(weight_amax(weight, "group", 64), row, SIZES)
        parts = unshard_tensor(row.sharding, weight, SIZES)
        tensors = [torch.cat(parts)] if family == "phi" else parts
        assert len(tensors) == len(row.hf_names)
        read = []
        for tensor in tensors:
            blocks = tensor.float().flatten().view(-1, 64).abs().amax(dim=1)
            read.append(dequantize_nf4_absmax(*quantize_nf4_absmax(blocks)).view(len(tensor), -1))
        together = torch.cat(read)
        assert torch.equal(torch.cat(unshard_tensor(row.sharding, found, SIZES)), together)


def test_scales_and_kv_maxima_come_back_from_their_file(layer, tmp_path):
    scales = solved("nvfp4_svdquant", layer, torch.bfloat16)
    observed(tmp_path)
    kv = tuple(round_amax(one, torch.bfloat16) for one in load_attention(tmp_path, 0))
    save_scales(tmp_path, 5, scales, kv)
    for linear, one in load_scales(tmp_path, 5).items():
        assert set(one.tensors()) == set(scales[linear].tensors())
        assert all(torch.equal(scales[linear].tensors()[k], t) for k, t in one.tensors().items())
    key, value = load_kv(tmp_path, 5)
    assert key.shape == value.shape == ()
    assert (float(key), float(value)) == (3.296875, 0.69921875)  # nearest bfloat16


def test_what_is_read_ahead_comes_in_order_and_one_item_early():
    log = []

    def read(item):
        log.append(item)
        return 10 * item

    found = []
    for item, value in prefetch_to_device(range(5), read, torch.device("cpu")):
        found.append((item, value))
        assert max(log, default=0) <= item + 1
    assert found == [(i, 10 * i) for i in range(5)] and log == list(range(5))


def test_what_fails_while_it_is_read_ahead_is_raised():
    def read(item):
        if item == 2:
            raise OSError("gone")
        return item

    with pytest.raises(OSError, match="gone"):
        list(prefetch_to_device(range(4), read, torch.device("cpu")))
