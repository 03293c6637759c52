"""Folding of pre_quant_scale into norms, v and up: the layer's outputs stay the same."""

import pytest
import torch
from encoded_models import DECODER, DTYPE, random_weight

from nemo_vlm_ptq.calibrate.solve.layer import weight_names
from nemo_vlm_ptq.calibrate.solve.linear_scales import LinearScales
from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.numerics import decode, weight_amax
from nemo_vlm_ptq.targets.compressed_tensors.folding import fold_kv, fold_layer
from nemo_vlm_ptq.targets.writing.encode import KvScales, encode_layer

GROUP_SIZE = 64
SIZES = DECODER.sizes(1)
HALF_ULP = 2.0**-8  # of a bfloat16 norm, relative
FORMAT_NAMES = ["int8_sq", "int4_awq"]
INPUT_NORMS = (("linear_qkv", "input_layernorm"), ("linear_fc1", "pre_mlp_layernorm"))


def linear_scales(weight, fmt, pre_quant_scale):
    """Return scales of a weight that was divided by `pre_quant_scale`."""
    return LinearScales(
        weight_amax=weight_amax(weight, fmt.granularity, GROUP_SIZE),
        input_amax=None if fmt.activation is None else torch.tensor(1.0),
        pre_quant_scale=pre_quant_scale,
    )


def random_layer(fmt, family, *, shared):
    """Return an encoded layer, the folded layer, and their scales.

    shared: query heads that share a KV head have the same pre_quant_scale of o_proj.
    """
    torch.manual_seed(0)
    family = FAMILIES[family]
    rows = family.parameter_map(DECODER)
    entries = [entry.for_layer(0) for entry in rows if entry.per_layer]
    weights = {entry.megatron_name: random_weight(family, entry, DECODER) for entry in entries}
    scales = {}
    for linear, name in weight_names(0).items():
        pre_quant_scale = (torch.rand(weights[name].shape[1]) + 0.5).to(DTYPE).float()
        if linear == "linear_proj" and shared:
            heads = pre_quant_scale.view(SIZES.kv_heads, SIZES.queries_per_kv_head, -1)
            pre_quant_scale = heads[:, :1].expand_as(heads).reshape(-1)
        scales[linear] = linear_scales(weights[name], fmt, pre_quant_scale)

    def read(names):
        return {name: weights[name] for name in names}

    def imported(names):
        factor = scales["linear_proj"].pre_quant_scale
        return {name: weights[name].float() * factor for name in names}

    layer = encode_layer(rows, 0, read, scales, fmt, DECODER)
    return layer, fold_layer(layer, scales, imported, fmt, DECODER), scales


def decoded(linear):
    return decode(linear.codes, linear.scale, linear.number_format)


def outputs(parts, x):
    """Return the output of each part of a linear for x [N,K], with its pre_quant_scale."""
    return [
        (x if part.pre_quant_scale is None else x * part.pre_quant_scale) @ decoded(part).T
        for part in parts
    ]


def expand_kv_heads(value_NO):
    """Repeat values of KV heads for each query head, [N, heads * head_dim]."""
    heads = value_NO.unflatten(1, (SIZES.kv_heads, 1, SIZES.head_dim))
    return heads.expand(-1, -1, SIZES.queries_per_kv_head, -1).flatten(1)


def without_pre_quant_scale(linear):
    return type(linear)(number_format=linear.number_format, codes=linear.codes, scale=linear.scale)


@pytest.mark.parametrize("family", ["llava", "phi"])
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_folded_layer_has_same_outputs(name, family):
    layer, folded, _ = random_layer(FORMATS[name], family, shared=True)
    x = torch.randn(5, DECODER.hidden)
    for linear, norm in INPUT_NORMS:
        before, after = (x * one[norm].parts[0].float() for one in (layer, folded))
        pairs = zip(
            outputs(layer[linear].parts, before), outputs(folded[linear].parts, after), strict=True
        )
        for index, (expected, actual) in enumerate(pairs):
            if index < len(layer[linear].parts) - 1:  # v and up absorb another scale
                assert (expected - actual).norm() < HALF_ULP * expected.norm()
    v, up = torch.randn(5, DECODER.hidden), torch.randn(5, DECODER.hidden)
    *_, v_before = outputs([without_pre_quant_scale(one) for one in layer["linear_qkv"].parts], v)
    *_, v_after = outputs(folded["linear_qkv"].parts, v)
    (expected,) = outputs(layer["linear_proj"].parts, expand_kv_heads(v_before))
    (actual,) = outputs(folded["linear_proj"].parts, expand_kv_heads(v_after))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    *_, up_before = outputs([without_pre_quant_scale(one) for one in layer["linear_fc1"].parts], up)
    *_, up_after = outputs(folded["linear_fc1"].parts, up)
    (expected,) = outputs(layer["linear_fc2"].parts, up_before)
    (actual,) = outputs(folded["linear_fc2"].parts, up_after)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_folding_changes_no_code_and_removes_pre_quant_scale(name):
    layer, folded, _ = random_layer(FORMATS[name], "llava", shared=True)
    for linear in weight_names(0):
        for before, after in zip(layer[linear].parts, folded[linear].parts, strict=True):
            assert torch.equal(before.codes, after.codes)
            assert before.pre_quant_scale is not None and after.pre_quant_scale is None


def test_o_proj_is_encoded_again_if_scales_of_query_heads_differ():
    layer, folded, scales = random_layer(FORMATS["int8_sq"], "llava", shared=False)
    (before,), (after,) = (one["linear_proj"].parts for one in (layer, folded))
    exact = decoded(before) * before.pre_quant_scale  # within half a step of the 16 bit weight
    heads = before.pre_quant_scale.view(SIZES.kv_heads, SIZES.queries_per_kv_head, -1)
    minimum = heads.amin(dim=1, keepdim=True).expand_as(heads).reshape(-1)
    error = (decoded(after) * minimum - exact).abs()
    steps = before.scale[:, None] * before.pre_quant_scale + after.scale[:, None] * minimum
    assert bool((error <= steps).all())
    assert torch.equal(after.input_scale, before.input_scale)
    factors = folded["linear_qkv"].parts[2].scale / layer["linear_qkv"].parts[2].scale
    torch.testing.assert_close(factors, minimum.view_as(heads)[:, 0].reshape(-1))
    # Inputs stay within the static scale.
    assert bool((minimum <= scales["linear_proj"].pre_quant_scale).all())


def test_value_scale_of_kv_cache_grows_by_largest_factor():
    _, _, scales = random_layer(FORMATS["int8_sq"], "llava", shared=True)
    kv = KvScales(key=torch.tensor(0.5), value=torch.tensor(0.25))
    folded = fold_kv(kv, scales, SIZES)
    assert torch.equal(folded.key, kv.key)
    assert float(folded.value) == pytest.approx(
        0.25 * float(scales["linear_proj"].pre_quant_scale.max())
    )


def test_format_without_pre_quant_scale_is_unchanged():
    assert fold_layer({}, {}, dict, FORMATS["fp8"], DECODER) == {}
