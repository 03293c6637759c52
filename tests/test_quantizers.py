"""A quantized Megatron model computes what its format means, saved and loaded, on any ranks.

What it should compute is written out here from the rounding of numbers, which test_numerics.py
compares with those who wrote the formats.
"""

import copy
import sys
from pathlib import Path

import modelopt.torch.opt as mto
import models
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from modelopt.torch.opt.plugins.mcore_dist_checkpointing import restore_sharded_modelopt_state
from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer

from nemo_vlm_ptq.calibrate import modules, quantizers
from nemo_vlm_ptq.calibrate.scales import LinearScales, cut_scales
from nemo_vlm_ptq.calibrate.statistics import LINEARS
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import Decoder
from nemo_vlm_ptq.formats import FORMATS, KV_CACHES
from nemo_vlm_ptq.megatron.attention import SdpaCoreAttention
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import save_model
from nemo_vlm_ptq.numerics import round_nvfp4, round_trip, weight_amax

DECODER = Decoder(256, 512, 2, 8, 4, 32, 500, 1e-5, 1e4, 256)
SHAPES = {
    "linear_qkv": (512, 256),
    "linear_proj": (256, 256),
    "linear_fc1": (1024, 256),
    "linear_fc2": (256, 512),
}
GROUP, VOCAB = 64, 512
INPUT_TOP, KEY_TOP, VALUE_TOP = 3.0, 2.5, 1.75
IDS = torch.arange(40)[None]
TENSOR_RANKS = [(1, 1, 2), (2, 1, 1)]
CASES = [*((name, "none") for name in FORMATS), *(("nf4", kv) for kv in KV_CACHES)]
CASES += [("nvfp4_svdquant", kv) for kv in KV_CACHES]


@pytest.fixture(scope="module")
def own():
    with models.alone() as session:
        yield session


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole_weight(layer, linear):
    seed = 10 * layer + list(LINEARS).index(linear)
    return random(*SHAPES[linear], seed=seed) * 0.06


def cut(weight, linear, t, T):
    """Shard t of T of a linear's weight."""
    if linear in ("linear_proj", "linear_fc2"):
        return weight.chunk(T, dim=1)[t]
    if linear == "linear_fc1":
        return torch.cat([half.chunk(T)[t] for half in weight.chunk(2)])
    return weight.chunk(T)[t]


def rounded_part(weight, prequant, a, b):
    """The weight that is rounded."""
    if prequant is not None:
        weight = (weight.float() * (1 / prequant.float())).to(weight.dtype)
    if a is not None:
        weight = (weight.double() - b.double() @ a.double()).to(weight.dtype)
    return weight


def whole_scales(name, layer, linear, dtype):
    """Random scales of a format for a whole linear, with the maxima that go with them."""
    row, (outputs, inputs) = FORMATS[name], SHAPES[linear]
    seed = 100 + 10 * layer + list(LINEARS).index(linear)
    prequant = a = b = None
    if row.prequant:
        prequant = (1.5 + random(inputs, seed=seed).clamp(-1, 1)).to(dtype)
    if row.low_rank:
        a = (random(row.low_rank, inputs, seed=seed + 1) / 16).to(dtype)
        b = (random(outputs, row.low_rank, seed=seed + 2) / 16).to(dtype)
    rest = rounded_part(whole_weight(layer, linear).to(dtype), prequant, a, b)
    return LinearScales(
        weight_amax(rest, row.granularity, row.group(GROUP)).to(dtype).float(),
        rest.float().abs().amax() if row.weight_second else None,
        torch.tensor(INPUT_TOP) if row.activation in ("fp8", "int8", "nvfp4") else None,
        None if prequant is None else prequant.float(),
        a,
        b,
    )


def kv_of(layer):
    return torch.tensor(KEY_TOP), torch.tensor([VALUE_TOP])


def scales_of(name, session, dtype):
    def cut_to_own(layer, linear):
        whole = whole_scales(name, layer, linear, dtype)
        return cut_scales(whole, linear, session.tensor, session.layout.tensor)

    return cut_to_own


def plain_model(session, dtype):
    """The decoder with random weights, the same on every layout."""
    model = build_decoder(DECODER, session, dtype)
    t, T = session.tensor, session.layout.tensor
    for parameter in model.parameters():
        parameter.fill_(1.0)
    for layer, linear, module in quantizers._linears(model):
        module.weight.copy_(cut(whole_weight(layer, linear), linear, t, T))
    for seed, module in enumerate((model.embedding.word_embeddings, model.output_layer)):
        module.weight.copy_((random(VOCAB, 256, seed=77 + seed) * 0.06).chunk(T)[t])
    return model


def inserted(session, name, kv, dtype):
    """A model without weights, with quantizers."""
    model = build_decoder(DECODER, session, dtype)
    quantizers.insert_quantizers(model, FORMATS[name], GROUP, KV_CACHES.get(kv))
    return model


def fill(model, session, name, kv, dtype):
    given = scales_of(name, session, dtype)
    quantizers.fill_quantizers(model, FORMATS[name], given, None if kv == "none" else kv_of)


def quantized(session, name, kv, dtype):
    """The model as solve leaves it."""
    row, model = FORMATS[name], plain_model(session, dtype)
    quantizers.insert_quantizers(model, row, GROUP, KV_CACHES.get(kv))
    quantizers.prepare_weights(model, row, scales_of(name, session, dtype))
    fill(model, session, name, kv, dtype)
    return model


def ask(model):
    return model(IDS, IDS, None)[0, :, : DECODER.vocab].float()


def rounded_input(x, activation):
    """An input [S,1,K] as a format rounds it."""
    top = torch.tensor(INPUT_TOP)
    if activation is None:
        return x
    if activation == "nvfp4":
        return round_nvfp4(x, top)
    flat = x.flatten(0, 1)
    if activation == "fp8_token":
        rows = [round_trip(one[None], one.abs().amax(), "fp8") for one in flat]
        return torch.cat(rows).view_as(x)
    return round_trip(flat, top, activation).view_as(x)


@pytest.mark.parametrize("name", FORMATS)
def test_a_linear_computes_what_its_format_means(own, name):
    row, dtype = FORMATS[name], torch.float32
    model = quantized(own, name, "none", dtype)
    quantizers.use_own_rounding(model, FORMATS[name])
    for layer, linear, module in quantizers._linears(model):
        scales = whole_scales(name, layer, linear, dtype)
        x = random(16, 1, SHAPES[linear][1], seed=5)
        scaled = x if scales.prequant is None else x * scales.prequant
        rest = rounded_part(
            whole_weight(layer, linear), scales.prequant, scales.low_rank_a, scales.low_rank_b
        )
        weight = round_trip(rest, scales.weight_amax, row.weight)
        if row.weight_second:
            weight = round_trip(weight, scales.weight_amax_2, row.weight_second)
        wanted = rounded_input(scaled, row.activation) @ weight.T
        if scales.low_rank_a is not None:
            wanted += scaled @ scales.low_rank_a.T @ scales.low_rank_b.T
        torch.testing.assert_close(module(x)[0], wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kv", KV_CACHES)
@pytest.mark.parametrize("name", ["fp8", "nf4"])
def test_attention_sees_keys_and_values_as_a_cache_holds_them(own, name, kv):
    model = quantized(own, name, kv, torch.float32)
    quantizers.use_own_rounding(model, FORMATS[name])
    core = model.decoder.layers[1].self_attention.core_attention
    q, k, v = (
        random(20, 2, 8, 32, seed=1),
        random(20, 2, 4, 32, seed=2),
        random(20, 2, 4, 32, seed=3),
    )

    def cached(x, top):
        if kv == "nvfp4":
            return round_nvfp4(x, torch.tensor(top))
        return round_trip(x.flatten(0, 2), torch.tensor(top), KV_CACHES[kv].kind).view_as(x)

    def attend(keys, values):
        parts = (x.permute(1, 2, 0, 3) for x in (q, keys, values))
        out = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)

    wanted = attend(cached(k, KEY_TOP), cached(v, VALUE_TOP))
    torch.testing.assert_close(core(q, k, v, None), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted, attend(k, v), atol=1e-3)
    quantizers.stop_rounding_activations(model)
    torch.testing.assert_close(core(q, k, v, None), attend(k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "kv"), CASES)
def test_just_the_linears_and_the_cache_are_quantized(own, name, kv):
    model, row = quantized(own, name, kv, torch.bfloat16), FORMATS[name]
    enabled = {
        key.removeprefix("decoder.layers.")
        for key, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and module.is_enabled
    }
    expected = set()
    for layer in range(DECODER.layers):
        for path in LINEARS.values() if row.modelopt_preset else ():
            both = [f"{layer}.{path}.weight_quantizer"]
            if row.weight_second:
                both = [f"{both[0]}.{index}" for index in range(2)]
            expected.update(both)
            if row.activation:
                expected.add(f"{layer}.{path}.input_quantizer")
        if kv != "none":
            core = f"{layer}.self_attention.core_attention"
            expected.update((f"{core}.k_bmm_quantizer", f"{core}.v_bmm_quantizer"))
    assert enabled == expected
    if kv == "none":
        assert not any("bmm" in key for key, _ in model.named_modules())


def test_a_quantizer_too_many_is_refused(own):
    model = quantized(own, "int8_wo", "none", torch.float32)
    model.output_layer.input_quantizer.enable()
    with pytest.raises(UserError, match="9 quantizers are enabled, 8 were expected"):
        fill(model, own, "int8_wo", "none", torch.float32)


def test_nf4_leaves_the_values_that_its_codes_stand_for(own):
    model = quantized(own, "nf4", "none", torch.bfloat16)
    assert not any(isinstance(module, TensorQuantizer) for module in model.modules())
    for layer, linear, module in quantizers._linears(model):
        scales = whole_scales("nf4", layer, linear, torch.bfloat16)
        weight = whole_weight(layer, linear).bfloat16()
        wanted = round_trip(weight, scales.weight_amax, "nf4").bfloat16()
        assert torch.equal(module.weight, wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_get_the_codes_of_what_was_divided_and_had_its_branch_taken_off(own, name):
    model, row = quantized(own, name, "none", torch.bfloat16), FORMATS[name]
    for layer, linear, module in quantizers._linears(model):
        scales = whole_scales(name, layer, linear, torch.bfloat16)
        rest = rounded_part(
            whole_weight(layer, linear).bfloat16(),
            scales.prequant,
            scales.low_rank_a,
            scales.low_rank_b,
        )
        wanted = round_trip(rest, scales.weight_amax, row.weight)
        found = module.weight.float()
        if row.modelopt_preset:
            assert (found - rest.float()).abs().max() <= 2.0**-7 * rest.float().abs().max()
            found = round_trip(module.weight, scales.weight_amax, row.weight)
        assert torch.equal(found.bfloat16(), wanted.bfloat16())


def tensors_of(model):
    return {key: one for key, one in model.state_dict().items() if isinstance(one, torch.Tensor)
            and not key.endswith("_extra_state")}  # fmt: skip


@pytest.mark.parametrize(("name", "kv"), CASES)
def test_saved_and_loaded_it_is_the_same(own, tmp_path, name, kv):
    first = quantized(own, name, kv, torch.bfloat16)
    save_model(first, tmp_path)
    quantizers.save_modelopt_state(first, tmp_path)
    second = inserted(own, name, kv, torch.bfloat16)
    fill(second, own, name, kv, torch.bfloat16)
    for buffer in second.buffers():
        buffer.zero_()  # so that it is seen to come from the checkpoint
    models.load_with_megatron(second, tmp_path)
    expected, found = tensors_of(first), tensors_of(second)
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key].float(), tensor.float()), key
    for model in (first, second):
        quantizers.use_own_rounding(model, FORMATS[name])
    assert torch.equal(ask(second), ask(first))


@pytest.mark.parametrize(
    ("name", "kv"),
    [(name, "none") for name in ("fp8_pc_pt", "nvfp4", "nvfp4_awq", "int8_wo", "int4_wo")]
    + [("nvfp4", kv) for kv in KV_CACHES],
)
def test_modelopt_restores_the_saved_model_by_itself(own, tmp_path, request, name, kv):
    first = quantized(own, name, kv, torch.bfloat16)
    save_model(first, tmp_path)
    quantizers.save_modelopt_state(first, tmp_path)
    if kv != "none":  # it has to know the attention, as it knows TransformerEngine's
        QuantModuleRegistry.register({SdpaCoreAttention: "SdpaCoreAttention"})(modules.KvAttention)
        request.addfinalizer(lambda: QuantModuleRegistry.unregister(SdpaCoreAttention))
    second = build_decoder(DECODER, own, torch.bfloat16)
    for parameter in second.parameters():
        parameter.zero_()  # it makes maxima of whatever is there before it loads the saved ones
    assert not mto.ModeloptStateManager.is_converted(second)
    restore_sharded_modelopt_state([second], tmp_path)
    models.load_with_megatron(second, tmp_path)
    backends = [one.backend for one in second.modules() if isinstance(one, TensorQuantizer)]
    assert backends and not any(backends)
    for model in (first, second):
        quantizers.use_own_rounding(model, FORMATS[name])
    assert torch.equal(ask(second), ask(first))


def test_modelopts_presets_stay_as_they_are(own):
    import modelopt.torch.quantization as mtq

    names = {row.modelopt_preset for row in FORMATS.values()} - {""}
    names |= {"FP8_KV_CFG", "NVFP4_KV_CFG"}
    before = {name: copy.deepcopy(getattr(mtq, name)) for name in names}
    for row in FORMATS.values():
        for kv in (None, *KV_CACHES.values()):
            config = quantizers.preset(row, 32, kv)
            for entry in config["quant_cfg"]:
                parts = entry.get("cfg") or {}
                for part in parts if isinstance(parts, list) else [parts]:
                    block = part.get("block_sizes", {})
                    assert block.get(-1) in (None, 16 if "scale_bits" in block else 32)
    assert before == {name: getattr(mtq, name) for name in names}


def main():
    """Ranks: FOLDER; logits of each format with and without rounded activations, a layout a file.

    Every layout also saves its SVDQuant model, and the second loads that of the first.
    """
    folder = Path(sys.argv[1])
    for own in models.each_layout(TENSOR_RANKS):
        word, found = str(own.layout.tensor), {}
        for name, kv in CASES:
            model = quantized(own, name, kv, torch.float32)
            if (name, kv) == ("nvfp4_svdquant", "fp8"):
                target = folder / f"saved{word}"
                if own.rank == 0:
                    target.mkdir()
                own.barrier()
                save_model(model, target)
            quantizers.use_own_rounding(model, FORMATS[name])
            found[f"{name} {kv} rounded"] = ask(model)
            quantizers.stop_rounding_activations(model)
            found[f"{name} {kv} exact"] = ask(model)
        if own.layout.tensor == 2:
            other = inserted(own, "nvfp4_svdquant", "fp8", torch.float32)
            fill(other, own, "nvfp4_svdquant", "fp8", torch.float32)
            expected = {key: one.clone() for key, one in tensors_of(other).items() if "low_" in key}
            for buffer in other.buffers():
                buffer.zero_()
            models.load_with_megatron(other, folder / "saved1")
            branches = tensors_of(other)
            same = all(torch.equal(branches[key], one) for key, one in expected.items())
            found["branches"] = torch.tensor([len(expected), same])
        if own.rank == 0:
            torch.save(found, folder / f"logits{word}")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(tensor 1, tensor 2) -> what the ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    code, _, err = models.launch([*models.main_of("test_quantizers"), folder], 2)
    assert code == 0, err[-3000:]
    return [torch.load(folder / f"logits{T}") for T in (1, 2)]


@pytest.mark.parametrize(("name", "kv"), CASES)
def test_tensor_ranks_compute_the_same(ranks, name, kv):
    """Activations next to half way between two codes may go to either."""
    alone, cut_in_two = ranks
    exact, rounded = f"{name} {kv} exact", f"{name} {kv} rounded"
    torch.testing.assert_close(cut_in_two[exact], alone[exact], rtol=1e-4, atol=1e-4)
    rounding = (alone[rounded] - alone[exact]).norm()  # how many lie there is the CPU's affair
    allowed = max(0.02 * alone[rounded].norm(), 0.75 * rounding)
    assert (cut_in_two[rounded] - alone[rounded]).norm() <= allowed


def test_a_branch_saved_by_one_rank_is_cut_for_two(ranks):
    assert ranks[1]["branches"].tolist() == [2 * 4 * DECODER.layers, 1]
