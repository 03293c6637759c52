"""Readers return what was encoded: random models through every target and serving layout."""

import itertools

import encoded_models
import pytest
import torch
from encoded_models import DECODER, KV_AMAX, random_model, write_hf, write_trtllm
from fake_gpu import check_linears_on_device
from safetensors.torch import load_file

from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.targets.hf.reader import read_unified
from nemo_vlm_ptq.targets.registry import TARGETS
from nemo_vlm_ptq.targets.trtllm.contract import check_contract
from nemo_vlm_ptq.targets.trtllm.reader import read_trtllm
from nemo_vlm_ptq.verify.tensors import check_kv_scales
from nemo_vlm_ptq.workdir.store import save_tensors

LAYOUTS = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2)]  # (tensor, pipeline); 4 KV heads
FAMILY_LAYOUTS = [
    (family, layout)
    for family in encoded_models.DECODERS
    for layout in LAYOUTS
    if family == "llava" or layout[1] == 1
]  # TensorRT-LLM's Phi-3 has no pipeline parallelism
LAYER = "transformer.layers.1."
KV_SCALE = f"{LAYER}attention.kv_cache_scaling_factor"
LLAVA_PREFIX = FAMILIES["llava"].decoder_prefix


def format_names(target):
    return [name for name in FORMATS if name in TARGETS[target].formats]


def equal_or_none(first, second):
    return (first is None) == (second is None) and (first is None or torch.equal(first, second))


def check_read(read, model):
    """Check that plain tensors are equal, and linears are decoded from the model's codes."""
    expected = encoded_models.by_hf_name(model)
    plain = {name: t for name, t in expected.items() if isinstance(t, torch.Tensor)}
    assert set(read.plain) == set(plain)
    assert all(torch.equal(read.plain[name], tensor) for name, tensor in plain.items())
    linears = {name.removesuffix(".weight"): expected[name] for name in set(expected) - set(plain)}
    assert set(read.linears) == set(linears)
    for name, encoded in linears.items():
        linear = read.linears[name]
        weight = linear.dequantize().weight
        assert torch.equal(weight, encoded_models.decoded_weight(encoded)), name
        assert equal_or_none(linear.pre_quant_scale, encoded.pre_quant_scale), name
        assert equal_or_none(linear.input_scale, encoded.input_scale), name
        assert (linear.low_rank is None) == (encoded.low_rank_a is None)
        if linear.low_rank is not None:
            assert torch.equal(linear.low_rank[0], encoded.low_rank_a.float()), name
            assert torch.equal(linear.low_rank[1], encoded.low_rank_b.float()), name


@pytest.mark.parametrize(("family", "layout"), FAMILY_LAYOUTS)
@pytest.mark.parametrize("name", format_names("trtllm"))
def test_trtllm_export_is_read_back_from_any_layout(tmp_path, name, family, layout):
    model = random_model(FORMATS[name], family)
    write_trtllm(tmp_path / "llm", model, layout)
    check_read(read_trtllm(tmp_path / "llm", FAMILIES[family].decoder_prefix), model)


@pytest.mark.parametrize("family", encoded_models.DECODERS)
@pytest.mark.parametrize("name", format_names("hf"))
def test_hf_export_is_read_back(tmp_path, name, family):
    model = random_model(FORMATS[name], family)
    write_hf(tmp_path / "hf", model)
    check_read(read_unified(tmp_path / "hf", FAMILIES[family]), model)


@pytest.mark.parametrize(
    ("name", "target"),
    [(name, target) for target in ("trtllm", "hf") for name in format_names(target)],
)
def test_linears_are_decoded_on_a_gpu(tmp_path, name, target, monkeypatch):
    model = random_model(FORMATS[name])
    if target == "trtllm":
        write_trtllm(tmp_path / "llm", model)
        read = read_trtllm(tmp_path / "llm", "")
    else:
        write_hf(tmp_path / "hf", model)
        read = read_unified(tmp_path / "hf", FAMILIES["llava"])
    check_linears_on_device(read.linears, monkeypatch)


def test_kv_heads_are_replicated_if_fewer_than_ranks(tmp_path):
    T, model = 8, random_model(FORMATS["fp8"])
    write_trtllm(tmp_path / "llm", model, (T, 1))
    codes = [part.codes.view(torch.uint8) for part in model.layers[1]["linear_qkv"].parts]
    for t in range(T):
        tensors = load_file(tmp_path / "llm" / f"rank{t}.safetensors")
        fused = tensors[LAYER + "attention.qkv.weight"].view(torch.uint8)
        heads = (t, t // 2, t // 2)  # two ranks share a KV head
        for part, head, rows in zip(codes, heads, fused.split(32), strict=True):
            assert torch.equal(rows, part[32 * head : 32 * (head + 1)])


def test_different_replicas_of_kv_head_are_rejected(tmp_path):
    write_trtllm(tmp_path / "llm", random_model(FORMATS["fp8"]), (8, 1))
    path = tmp_path / "llm" / "rank3.safetensors"
    tensors = load_file(path)
    tensors[LAYER + "attention.qkv.weight"].view(torch.uint8)[-1, 0] ^= 0x40
    save_tensors(tensors, path)
    with pytest.raises(VerificationError, match="differs from the replica on rank 2"):
        read_trtllm(tmp_path / "llm", LLAVA_PREFIX)


@pytest.mark.parametrize(("kv_cache", "max_code"), [("fp8", 448), ("int8", 127)])
@pytest.mark.parametrize("layout", [(1, 1), (8, 1), (2, 2)])
def test_trtllm_keys_and_values_share_the_larger_scale(tmp_path, kv_cache, max_code, layout):
    assert kv_cache in TARGETS["trtllm"].kv_caches
    write_trtllm(tmp_path / "llm", random_model(FORMATS["fp8"]), layout, kv_cache)
    assert check_contract(tmp_path / "llm") == []
    kv = read_trtllm(tmp_path / "llm", LLAVA_PREFIX).kv
    expected = torch.tensor([max(pair) for pair in KV_AMAX]) / max_code
    assert torch.equal(kv.key_scale, expected) and torch.equal(kv.value_scale, expected)
    assert kv.number_format == kv_cache


@pytest.mark.parametrize("family", encoded_models.DECODERS)
@pytest.mark.parametrize("kv_cache", TARGETS["hf"].kv_caches)
def test_hf_keys_and_values_have_separate_scales(tmp_path, kv_cache, family):
    write_hf(tmp_path / "hf", random_model(FORMATS["nvfp4"], family), kv_cache)
    read = read_unified(tmp_path / "hf", FAMILIES[family])
    key_amax, value_amax = map(torch.tensor, zip(*KV_AMAX, strict=True))
    assert torch.equal(read.kv.key_scale, key_amax / 448)
    assert torch.equal(read.kv.value_scale, value_amax / 448)
    assert read.kv.number_format == kv_cache
    assert not [name for name in read.plain if "scale" in name]


def test_different_kv_scales_on_ranks_are_rejected(tmp_path):
    write_trtllm(tmp_path / "llm", random_model(FORMATS["fp8"]), (2, 1), "fp8")
    path = tmp_path / "llm" / "rank1.safetensors"
    tensors = load_file(path)
    tensors[KV_SCALE] *= 2
    save_tensors(tensors, path)
    with pytest.raises(VerificationError, match="kv_cache_scaling_factor differs"):
        read_trtllm(tmp_path / "llm", LLAVA_PREFIX)


def remove(path, suffix):
    """Remove the tensors with a suffix from a file; return their number."""
    tensors = load_file(path)
    removed = [name for name in tensors if name.endswith(suffix)]
    save_tensors({name: t for name, t in tensors.items() if name not in removed}, path)
    return len(removed)


def test_missing_trtllm_kv_scale_is_rejected(tmp_path):
    write_trtllm(tmp_path / "llm", random_model(FORMATS["nvfp4"]), (2, 1), "fp8")
    assert remove(tmp_path / "llm" / "rank1.safetensors", KV_SCALE) == 1
    assert check_contract(tmp_path / "llm") == [f"rank1.safetensors: tensor {KV_SCALE} is missing"]
    with pytest.raises(VerificationError, match="kv_cache_scaling_factor is missing"):
        read_trtllm(tmp_path / "llm", LLAVA_PREFIX)


@pytest.mark.parametrize("suffix", ["layers.1.self_attn.k_proj.k_scale", "v_scale"])
def test_missing_hf_kv_scale_is_rejected(tmp_path, suffix):
    write_hf(tmp_path / "hf", random_model(FORMATS["fp8"]), "fp8")
    assert remove(tmp_path / "hf" / "model.safetensors", suffix)
    with pytest.raises(VerificationError, match="is missing"):
        read_unified(tmp_path / "hf", FAMILIES["llava"])


def test_kv_scales_other_than_solved_are_reported(tmp_path):
    write_hf(tmp_path / "hf", random_model(FORMATS["fp8"]), "fp8")
    kv = read_unified(tmp_path / "hf", FAMILIES["llava"]).kv
    solved = [(key / 448, value / 448) for key, value in KV_AMAX]
    assert check_kv_scales(kv, solved) == []
    assert check_kv_scales(kv, [solved[0], solved[1][::-1]]) == [
        "layer 1: scale of keys 0.015625, not 0.00446429",
        "layer 1: scale of values 0.00446429, not 0.015625",
    ]
    assert check_kv_scales(kv, solved[:1]) == ["2 layers have KV scales, not 1"]
    assert check_kv_scales(None, solved) == ["the KV cache has no scales"]


def test_kv_cache_unsupported_by_trtllm_is_reported(tmp_path):
    write_trtllm(tmp_path / "llm", random_model(FORMATS["fp8"]), (1, 1), "nvfp4")
    assert check_contract(tmp_path / "llm") == [
        "config.json: unsupported kv_cache_quant_algo 'NVFP4'; supported: None, FP8, INT8"
    ]


def test_nvfp4_layout_is_that_of_trtllm(tmp_path):
    """Byte j of a row holds columns 2j (low nibble) and 2j + 1; scales are not swizzled."""
    model = random_model(FORMATS["nvfp4"])
    write_trtllm(tmp_path / "llm", model, (2, 1))
    tensors = load_file(tmp_path / "llm" / "rank1.safetensors")
    packed = tensors[LAYER + "mlp.proj.weight"]
    scale = tensors[LAYER + "mlp.proj.weights_scaling_factor"]
    (encoded,) = model.layers[1]["linear_fc2"].parts
    columns = DECODER.ffn // 2
    assert packed.shape == (DECODER.hidden, columns // 2) and packed.dtype == torch.uint8
    for row, column in itertools.product((0, 100), (0, 1, 254, 255)):
        nibble = int(packed[row, column // 2]) >> 4 * (column % 2) & 15
        assert nibble == int(encoded.codes[row, columns + column])
    assert torch.equal(scale.float(), encoded.scale.float()[:, columns // 16 :])
