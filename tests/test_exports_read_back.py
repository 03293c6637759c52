"""What was packed is what is read: random models through every target, however it is cut."""

import itertools

import pytest
import streams
import torch
from pretended_gpu import check_linears_on_it
from safetensors.torch import load_file
from streams import DECODER, KV_AMAX, random_stream, write_hf, write_trtllm

from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.formats import FORMATS, KV_CACHES
from nemo_vlm_ptq.targets.hf.reader import read_unified
from nemo_vlm_ptq.targets.trtllm.contract import check_contract
from nemo_vlm_ptq.targets.trtllm.reader import read_trtllm
from nemo_vlm_ptq.verify.tensors import check_kv_scales
from nemo_vlm_ptq.workdir.store import save_tensors

CUTS = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2)]  # tensor x pipeline; 8 repeats KV heads
CUT_FAMILIES = [
    (name, cut) for name in streams.DECODERS for cut in CUTS if name == "llava" or cut[1] == 1
]  # TensorRT-LLM's Phi-3 has no pipeline parallelism
LAYER = "transformer.layers.1."


def formats_of(target):
    return [name for name, row in FORMATS.items() if target in row.targets]


def same_tensors(mine, theirs):
    return (mine is None) == (theirs is None) and (mine is None or torch.equal(mine, theirs))


def check_read(found, stream):
    """Plain tensors are equal, and linears are what the codes of the stream stand for."""
    whole = streams.by_name(stream)
    plain = {key: one for key, one in whole.items() if isinstance(one, torch.Tensor)}
    assert set(found.plain) == set(plain)
    assert all(torch.equal(found.plain[key], tensor) for key, tensor in plain.items())
    packed = {key.removesuffix(".weight"): whole[key] for key in set(whole) - set(plain)}
    assert set(found.linears) == set(packed)
    for key, one in packed.items():
        read = found.linears[key]
        assert torch.equal(read.values().weight, streams.values(one)), key
        assert same_tensors(read.pre_quant_scale, one.pre_quant_scale), key
        assert same_tensors(read.input_scale, one.input_scale), key
        assert (read.low_rank is None) == (one.low_rank_a is None)
        if read.low_rank is not None:
            assert torch.equal(read.low_rank[0], one.low_rank_a.float()), key
            assert torch.equal(read.low_rank[1], one.low_rank_b.float()), key


@pytest.mark.parametrize(("family", "cut"), CUT_FAMILIES)
@pytest.mark.parametrize("name", formats_of("trtllm"))
def test_a_trtllm_export_reads_back_the_same_however_inference_cuts_it(tmp_path, name, family, cut):
    stream = random_stream(FORMATS[name], family)
    write_trtllm(tmp_path / "cut", stream, cut)
    check_read(read_trtllm(tmp_path / "cut", FAMILIES[family].decoder_prefix), stream)


@pytest.mark.parametrize("family", streams.DECODERS)
@pytest.mark.parametrize("name", formats_of("hf"))
def test_a_hugging_face_export_reads_back_the_same(tmp_path, name, family):
    stream = random_stream(FORMATS[name], family)
    write_hf(tmp_path / "hf", stream)
    check_read(read_unified(tmp_path / "hf", FAMILIES[family]), stream)


@pytest.mark.parametrize(
    ("name", "target"), [(name, "trtllm") for name in formats_of("trtllm")]
    + [(name, "hf") for name in formats_of("hf")],
)  # fmt: skip
def test_what_is_read_is_worked_with_on_a_gpu(tmp_path, name, target, monkeypatch):
    stream = random_stream(FORMATS[name])
    if target == "trtllm":
        write_trtllm(tmp_path / "cut", stream)
        read = read_trtllm(tmp_path / "cut", "")
    else:
        write_hf(tmp_path / "hf", stream)
        read = read_unified(tmp_path / "hf", FAMILIES["llava"])
    check_linears_on_it(read.linears, monkeypatch)


def test_kv_heads_are_repeated_where_there_are_fewer_than_ranks(tmp_path):
    T, stream = 8, random_stream(FORMATS["fp8"])
    write_trtllm(tmp_path / "cut", stream, (T, 1))
    codes = [part.codes.view(torch.uint8) for part in stream.layers[1]["linear_qkv"].parts]
    for t in range(T):
        own = load_file(tmp_path / "cut" / f"rank{t}.safetensors")
        fused = own[LAYER + "attention.qkv.weight"].view(torch.uint8)
        heads = (t, t // 2, t // 2)  # two ranks share a KV head
        for part, head, rows in zip(codes, heads, fused.split(32), strict=True):
            assert torch.equal(rows, part[32 * head : 32 * (head + 1)])


def test_repeated_kv_heads_that_differ_are_found(tmp_path):
    write_trtllm(tmp_path / "cut", random_stream(FORMATS["fp8"]), (8, 1))
    path = tmp_path / "cut" / "rank3.safetensors"
    tensors = load_file(path)
    tensors[LAYER + "attention.qkv.weight"].view(torch.uint8)[-1, 0] ^= 0x40
    save_tensors(tensors, path)
    with pytest.raises(VerificationError):
        read_trtllm(tmp_path / "cut", FAMILIES["llava"].decoder_prefix)


def kv_of(target):
    return [name for name, row in KV_CACHES.items() if target in row.targets]


@pytest.mark.parametrize(("kv", "reach"), [("fp8", 448), ("int8", 127)])
@pytest.mark.parametrize("cut", [(1, 1), (8, 1), (2, 2)])
def test_trtllm_keys_and_values_share_the_larger_scale(tmp_path, kv, reach, cut):
    assert kv in kv_of("trtllm")
    write_trtllm(tmp_path / "cut", random_stream(FORMATS["fp8"]), cut, kv)
    assert check_contract(tmp_path / "cut") == []
    found = read_trtllm(tmp_path / "cut", FAMILIES["llava"].decoder_prefix).kv
    expected = torch.tensor([max(pair) for pair in KV_AMAX]) / reach
    assert torch.equal(found.key, expected) and torch.equal(found.value, expected)
    assert found.rounding == kv


@pytest.mark.parametrize("family", streams.DECODERS)
@pytest.mark.parametrize("kv", kv_of("hf"))
def test_hugging_face_keys_and_values_have_scales_of_their_own(tmp_path, kv, family):
    write_hf(tmp_path / "hf", random_stream(FORMATS["nvfp4"], family), kv)
    read = read_unified(tmp_path / "hf", FAMILIES[family])
    for own, amaxes in zip((read.kv.key, read.kv.value), zip(*KV_AMAX, strict=True), strict=True):
        assert torch.equal(own, torch.tensor(amaxes) / 448)
    assert read.kv.rounding == kv
    assert not [name for name in read.plain if "scale" in name]


def test_a_kv_scale_that_differs_between_ranks_is_found(tmp_path):
    write_trtllm(tmp_path / "cut", random_stream(FORMATS["fp8"]), (2, 1), "fp8")
    path = tmp_path / "cut" / "rank1.safetensors"
    tensors = load_file(path)
    tensors[LAYER + "attention.kv_cache_scaling_factor"] *= 2
    save_tensors(tensors, path)
    with pytest.raises(VerificationError, match="kv_cache_scaling_factor differs"):
        read_trtllm(tmp_path / "cut", FAMILIES["llava"].decoder_prefix)


def lose(path, ending):
    """Take the tensors whose names end so out of a file; how many they were."""
    tensors = load_file(path)
    lost = [name for name in tensors if name.endswith(ending)]
    save_tensors({name: one for name, one in tensors.items() if name not in lost}, path)
    return len(lost)


def test_a_missing_trtllm_kv_scale_is_found(tmp_path):
    write_trtllm(tmp_path / "cut", random_stream(FORMATS["nvfp4"]), (2, 1), "fp8")
    path = tmp_path / "cut" / "rank1.safetensors"
    assert lose(path, "layers.1.attention.kv_cache_scaling_factor") == 1
    assert check_contract(tmp_path / "cut") == [
        f"rank1.safetensors: {LAYER}attention.kv_cache_scaling_factor is missing"
    ]
    with pytest.raises(VerificationError, match="kv_cache_scaling_factor is missing"):
        read_trtllm(tmp_path / "cut", FAMILIES["llava"].decoder_prefix)


@pytest.mark.parametrize("ending", ["layers.1.self_attn.k_proj.k_scale", "v_scale"])
def test_a_missing_hugging_face_kv_scale_is_found(tmp_path, ending):
    write_hf(tmp_path / "hf", random_stream(FORMATS["fp8"]), "fp8")
    assert lose(tmp_path / "hf" / "model.safetensors", ending)
    with pytest.raises(VerificationError, match="is missing"):
        read_unified(tmp_path / "hf", FAMILIES["llava"])


def test_kv_scales_that_were_not_solved_are_found(tmp_path):
    write_hf(tmp_path / "hf", random_stream(FORMATS["fp8"]), "fp8")
    kv = read_unified(tmp_path / "hf", FAMILIES["llava"]).kv
    solved = [(key / 448, value / 448) for key, value in KV_AMAX]
    assert check_kv_scales(kv, solved) == []
    assert check_kv_scales(kv, [solved[0], solved[1][::-1]]) == [
        "layer 1: scale of keys 0.015625, not 0.00446429",
        "layer 1: scale of values 0.00446429, not 0.015625",
    ]
    assert check_kv_scales(kv, solved[:1]) == ["2 layers have KV scales, not 1"]
    assert check_kv_scales(None, solved) == ["the KV cache has no scales"]


def test_a_kv_cache_that_tensorrt_llm_does_not_know_is_found(tmp_path):
    write_trtllm(tmp_path / "cut", random_stream(FORMATS["fp8"]), (1, 1), "nvfp4")
    assert check_contract(tmp_path / "cut") == [
        "config.json: kv_cache_quant_algo 'NVFP4' is not known; known: None, FP8, INT8"
    ]


def test_nvfp4_lies_as_tensorrt_llm_asks_for_it(tmp_path):
    """Byte j of a row holds columns 2j (low nibble) and 2j + 1, scales are not swizzled."""
    stream = random_stream(FORMATS["nvfp4"])
    write_trtllm(tmp_path / "cut", stream, (2, 1))
    own = load_file(tmp_path / "cut" / "rank1.safetensors")
    packed = own[LAYER + "mlp.proj.weight"]
    scale = own[LAYER + "mlp.proj.weights_scaling_factor"]
    (whole,) = stream.layers[1]["linear_fc2"].parts
    half = DECODER.ffn // 2
    assert packed.shape == (DECODER.hidden, half // 2) and packed.dtype == torch.uint8
    for row, column in itertools.product((0, 100), (0, 1, 254, 255)):
        nibble = int(packed[row, column // 2]) >> 4 * (column % 2) & 15
        assert nibble == int(whole.codes[row, half + column])
    assert torch.equal(scale.float(), whole.scale.float()[:, half // 16 :])
