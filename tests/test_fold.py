"""Scales folded into norms, rows of v and rows of up: the layer computes what it did before."""

import pytest
import torch
from streams import DECODER, DTYPE, random_weight

from nemo_vlm_ptq.calibrate.solve.layer import weight_names
from nemo_vlm_ptq.calibrate.solve.scales import LinearScales
from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.numerics import decode, weight_amax
from nemo_vlm_ptq.targets.compressed_tensors.folding import fold_kv, fold_layer
from nemo_vlm_ptq.targets.writing.encode import KvScales, encode_layer

GROUP = 64
SIZES = DECODER.sizes(1)
HALF_ULP = 2.0**-8  # of a bfloat16 norm, relative
TIED = ["int8_sq", "int4_awq"]


def solved(weight, fmt, pre_quant_scale):
    """Scales of a weight that was divided by `prequant`."""
    amax = weight_amax(weight, fmt.granularity, GROUP)
    static = None if fmt.activation is None else torch.tensor(1.0)
    return LinearScales(amax, None, static, pre_quant_scale)


def random_layer(fmt, family, tied):
    """(layer as streamed, layer folded, scales); the 16 bit model has the same weights."""
    torch.manual_seed(0)
    rows = FAMILIES[family].parameter_map
    whole = {
        row.for_layer(0).megatron: random_weight(FAMILIES[family], row.for_layer(0), DECODER)
        for row in rows
        if row.per_layer
    }
    scales = {}
    for linear, name in weight_names(0).items():
        pre_quant_scale = (torch.rand(whole[name].shape[1]) + 0.5).to(DTYPE).float()
        if linear == "linear_proj" and tied:
            heads = pre_quant_scale.view(SIZES.kv_heads, SIZES.queries_per_kv_head, -1)
            pre_quant_scale = heads[:, :1].expand_as(heads).reshape(-1)
        scales[linear] = solved(whole[name], fmt, pre_quant_scale)

    def read(names):
        return {name: whole[name] for name in names}

    def imported(names):
        return {name: whole[name].float() * scales["linear_proj"].pre_quant_scale for name in names}

    layer = encode_layer(rows, 0, read, scales, fmt, DECODER)
    return layer, fold_layer(layer, scales, imported, fmt, DECODER), scales


def value(part):
    return decode(part.codes, part.scale, part.kind)


def through(parts, x):
    """x [N,K] through each part of a linear, its scale in front of it where it has one."""
    return [
        (x if one.pre_quant_scale is None else x * one.pre_quant_scale) @ value(one).T
        for one in parts
    ]


def heads_of(value_NO):
    """Values of KV heads as each query head would copy them, [N, heads * head_dim]."""
    heads = value_NO.unflatten(1, (SIZES.kv_heads, 1, SIZES.head_dim))
    return heads.expand(-1, -1, SIZES.queries_per_kv_head, -1).flatten(1)


@pytest.mark.parametrize("family", ["llava", "phi"])
@pytest.mark.parametrize("name", TIED)
def test_a_folded_layer_computes_what_it_did(name, family):
    layer, folded, _ = random_layer(FORMATS[name], family, tied=True)
    x = torch.randn(5, DECODER.hidden)
    for linear, norm in (("linear_qkv", "input_layernorm"), ("linear_fc1", "pre_mlp_layernorm")):
        before, after = (x * one[norm].parts[0].float() for one in (layer, folded))
        pairs = zip(
            through(layer[linear].parts, before), through(folded[linear].parts, after), strict=True
        )
        for index, (own, other) in enumerate(pairs):
            if index < len(layer[linear].parts) - 1:  # v and up have taken a scale themselves
                assert (own - other).norm() < HALF_ULP * own.norm()
    v, up = torch.randn(5, DECODER.hidden), torch.randn(5, DECODER.hidden)
    *_, v_before = through([value_only(one) for one in layer["linear_qkv"].parts], v)
    *_, v_after = through(folded["linear_qkv"].parts, v)
    (own,) = through(layer["linear_proj"].parts, heads_of(v_before))
    (other,) = through(folded["linear_proj"].parts, heads_of(v_after))
    torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-3)
    *_, up_before = through([value_only(one) for one in layer["linear_fc1"].parts], up)
    *_, up_after = through(folded["linear_fc1"].parts, up)
    (own,) = through(layer["linear_fc2"].parts, up_before)
    (other,) = through(folded["linear_fc2"].parts, up_after)
    torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-3)


def value_only(part):
    """A part without the scale in front of it."""
    return type(part)(part.kind, part.codes, part.scale)


@pytest.mark.parametrize("name", TIED)
def test_no_code_changes_and_no_scale_is_left_in_front(name):
    layer, folded, _ = random_layer(FORMATS[name], "llava", tied=True)
    for linear in weight_names(0):
        for own, other in zip(layer[linear].parts, folded[linear].parts, strict=True):
            assert torch.equal(own.codes, other.codes)
            assert own.pre_quant_scale is not None and other.pre_quant_scale is None


def test_query_heads_with_scales_of_their_own_share_the_least_and_o_proj_is_rounded_anew():
    layer, folded, scales = random_layer(FORMATS["int8_sq"], "llava", tied=False)
    (own,), (other,) = (one["linear_proj"].parts for one in (layer, folded))
    exact = value(own) * own.pre_quant_scale  # within half a step of the 16 bit weight
    heads = own.pre_quant_scale.view(SIZES.kv_heads, SIZES.queries_per_kv_head, -1)
    least = heads.amin(dim=1, keepdim=True).expand_as(heads).reshape(-1)
    apart = (value(other) * least - exact).abs()
    assert bool(
        (apart <= (own.scale[:, None] * own.pre_quant_scale + other.scale[:, None] * least)).all()
    )
    assert torch.equal(other.input_scale, own.input_scale)
    rows = folded["linear_qkv"].parts[2].scale / layer["linear_qkv"].parts[2].scale
    torch.testing.assert_close(rows, least.view_as(heads)[:, 0].reshape(-1))
    assert bool((least <= scales["linear_proj"].pre_quant_scale).all())  # no input leaves its range


def test_the_scale_of_cached_values_grows_with_the_largest_factor():
    _, _, scales = random_layer(FORMATS["int8_sq"], "llava", tied=True)
    kv = KvScales(torch.tensor(0.5), torch.tensor(0.25))
    grown = fold_kv(kv, scales, SIZES)
    assert torch.equal(grown.key, kv.key)
    assert float(grown.value) == pytest.approx(
        0.25 * float(scales["linear_proj"].pre_quant_scale.max())
    )


def test_a_format_without_scales_in_front_is_left_alone():
    torch.manual_seed(0)
    fmt = FORMATS["fp8"]
    assert fold_layer({}, {}, dict, fmt, DECODER) == {}
