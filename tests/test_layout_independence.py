"""What is observed, solved and exported does not depend on how many ranks did it, or how.

Data and pipeline ranks leave the same bytes. Tensor ranks add the parts of a row-parallel output in
another order, and in bfloat16 they round each part before: from there on activations differ by a
few steps. So scales are compared at tensor 2 where the model is in float32, and in bfloat16 the
error that they make is. Last: an export is the same however inference cuts it.
"""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.calibrate.scales import divide, finish, rounded_weight
from nemo_vlm_ptq.calibrate.solve import load_scales, weight_names
from nemo_vlm_ptq.calibrate.statistics import InputStatistics, layer_file, load_layer
from nemo_vlm_ptq.errors import ProofError
from nemo_vlm_ptq.export import trtllm
from nemo_vlm_ptq.export.stream import stream_ends, stream_layer
from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.families.base import Decoder, LongRope
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.mapping.layouts import Sizes, take
from nemo_vlm_ptq.mapping.rows import expand
from nemo_vlm_ptq.megatron.checkpoint import LayerReader
from nemo_vlm_ptq.runtime.read_trtllm import read_trtllm
from nemo_vlm_ptq.store import hash_file, read_manifest, save_tensors
from nemo_vlm_ptq.verify.contract import check_contract

LAYERS = range(4)
ONE, DATA, PIPELINE, TENSOR = "1x1x1", "1x1x2", "1x2x1", "2x1x1"
BF16_STEP = 2.0**-7  # largest relative distance of neighbours in bfloat16
WORSE = 1.05  # what rounding in tensor ranks may add to the error of a linear


def main():
    """Ranks: FOLDER TPxPPxDP[-float32] ..."""
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    layouts = [tuple(map(int, word.removesuffix("-float32").split("x"))) for word in words]
    for word, own in zip(words, models.each_layout(layouts), strict=True):
        if word.endswith("-float32"):
            models.run_line(own, folder / word, folder / "model32", models.STAGES[:3])
        else:
            models.run_line(own, folder / word)


def digests(folder, names):
    return {name: hash_file(folder / name) for name in names}


@pytest.mark.parametrize("layout", [DATA, PIPELINE])
def test_statistics_are_the_same_bytes(works, layout):
    names = [layer_file(layer) for layer in LAYERS]
    expected = digests(works[ONE] / "statistics", names)
    assert digests(works[layout] / "statistics", names) == expected


@pytest.mark.parametrize("layout", [DATA, PIPELINE])
@pytest.mark.parametrize("name", FORMATS)
def test_solved_scales_are_the_same_bytes(works, layout, name):
    names = [layer_file(layer) for layer in LAYERS]
    expected = digests(works[ONE] / name / "scales", names)
    assert digests(works[layout] / name / "scales", names) == expected


@pytest.mark.parametrize("layout", [DATA, PIPELINE])
@pytest.mark.parametrize(
    ("name", "target"), [(name, target) for name, row in FORMATS.items() for target in row.targets]
)
def test_exports_are_the_same_bytes(works, layout, name, target):
    found, expected = (read_manifest(works[key] / name / target) for key in (layout, ONE))
    assert found["files"] == expected["files"]
    assert any(file.endswith(".safetensors") for file in expected["files"])


def test_tensor_ranks_observe_the_same_bytes_before_the_first_sum_over_them(works):
    found, expected = (
        load_file(works[key] / "statistics" / layer_file(0)) for key in (TENSOR, ONE)
    )
    before = [
        key for key in expected if key.startswith(("linear_qkv", "linear_proj", "key", "val"))
    ]
    assert len(before) == 10
    assert all(torch.equal(found[key], expected[key]) for key in before)


@pytest.mark.parametrize("name", FORMATS)
def test_tensor_ranks_choose_the_same_alphas_in_float32(works, name):
    found, expected = (
        {(line["layer"], line["linear"]): line["alpha"] for line in manifest["facts"]["layers"]}
        for manifest in (
            read_manifest(works[f"{key}-float32"] / name / "scales") for key in (TENSOR, ONE)
        )
    )
    assert len(expected) == 4 * len(LAYERS)
    assert found == expected


@pytest.mark.parametrize("name", FORMATS)
def test_tensor_ranks_move_scales_by_less_than_a_step_in_float32(works, name):
    for layer in LAYERS:
        found, expected = (
            load_file(works[f"{key}-float32"] / name / "scales" / layer_file(layer))
            for key in (TENSOR, ONE)
        )
        assert set(found) == set(expected)
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=BF16_STEP, atol=0, msg=key)


def error_of(weight, scales, row, moment):
    """sqrt of tr(dW H dW^T) of a linear with these scales."""
    prequant = torch.ones(weight.shape[1]) if scales.prequant is None else scales.prequant
    smooth = divide(weight, scales.prequant)
    seen = rounded_weight(smooth, scales.weight_amax, row, scales.weight_amax_2)
    change = (seen * prequant - weight.float()).double()
    return float(torch.trace(change @ moment.double() @ change.T).sqrt())


@pytest.mark.parametrize("name", FORMATS)
def test_tensor_ranks_make_no_larger_error_in_bfloat16(works, name):
    reader = LayerReader(works[ONE] / "megatron")
    for layer in LAYERS:
        names = weight_names(layer)
        weights = reader.read(names.values())
        seen = load_layer(works[ONE] / "statistics", layer, torch.device("cpu"))
        found, expected = (
            load_scales(works[key] / name / "scales", layer) for key in (TENSOR, ONE)
        )
        for linear, full_name in names.items():
            given = (FORMATS[name], seen[linear].moment)
            own, other = (
                error_of(weights[full_name], scales[linear], *given) for scales in (found, expected)
            )
            assert own <= WORSE * other, (layer, linear)


@pytest.mark.parametrize("layout", [DATA, PIPELINE, TENSOR])
def test_every_sample_is_seen_by_one_data_rank(works, layout):
    facts = read_manifest(works[layout] / "statistics")["facts"]
    per_rank = facts["ids_per_rank"]
    assert len(per_rank) == int(layout[-1])
    together = [name for ids in per_rank for name in ids]
    alone = read_manifest(works[ONE] / "statistics")["facts"]["ids_per_rank"][0]
    assert len(together) == 12 and sorted(together) == sorted(alone)


ROPE = LongRope((1.0,) * 16, (2.0,) * 16, 128, 1.1)
DECODER = Decoder(256, 512, 2, 8, 4, 32, 500, 1e-5, 1e4, 256)
DECODERS = {"llava": DECODER, "phi": replace(DECODER, long_rope=ROPE)}
GROUP = 32
CUTS = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2)]  # tensor x pipeline; 8 repeats KV heads
CUT_FAMILIES = [
    (name, cut) for name in DECODERS for cut in CUTS if name == "llava" or cut[1] == 1
]  # TensorRT-LLM's Phi-3 has no pipeline parallelism


def random_weight(family, row):
    """Megatron's whole tensor of a row."""
    shapes = [DECODER.shapes(family.rows)[name] for name in row.hf]
    parts = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    sizes = Sizes(DECODER.heads, DECODER.kv_heads, DECODER.head_dim, DECODER.vocab, 512)
    return take(row.layout, parts, sizes, 0, 1)


def random_stream(fmt, family):
    """(layers, ends) of a random model as the exporters are given them."""
    torch.manual_seed(0)
    rows = expand(family.rows, range(DECODER.layers))
    whole = {row.megatron: random_weight(family, row) for row in rows}
    scales = {}
    for row in (row for row in rows if row.linear):
        width = whole[row.megatron].shape[1]
        seen = InputStatistics(torch.rand(width) + 0.1, torch.rand(width), 1, None)
        prequant = torch.rand(width) + 0.5 if fmt.prequant else None
        scales[row.megatron] = finish(whole[row.megatron], seen, fmt, GROUP, prequant)

    def read(names):
        return {name: whole[name] for name in names}

    layers = []
    for index in range(DECODER.layers):
        own = {linear: scales[name] for linear, name in weight_names(index).items()}
        layers.append(stream_layer(family.rows, index, read, own, fmt, DECODER))
    return layers, stream_ends(family.rows, read, DECODER)


def by_name(stream):
    """Hugging Face name -> Packed or tensor; parts that share a name above each other."""
    layers, ends = stream
    found = {}
    for piece in (piece for pieces in (*layers, ends) for piece in pieces.values()):
        parts = list(piece.parts)
        if piece.row.fused and isinstance(parts[0], torch.Tensor):
            parts = [torch.cat(parts)]
        elif piece.row.fused:
            codes = torch.cat([part.codes.view(torch.int8) for part in parts])
            scale = parts[0].scale
            scale = torch.cat([part.scale for part in parts]) if scale.dim() else scale
            parts = [replace(parts[0], codes=codes.view(parts[0].codes.dtype), scale=scale)]
        found |= dict(zip(piece.row.hf, parts, strict=True))
    return found


def write(folder, fmt, stream, cut, name="llava"):
    """rank files and config.json of one cut."""
    layers, ends = stream
    decoder, architecture = DECODERS[name], FAMILIES[name].trtllm_architecture
    (T, P), dtype = cut, torch.bfloat16
    folder.mkdir()
    for p, t in itertools.product(range(P), range(T)):
        tensors = trtllm.end_tensors(ends, architecture, decoder, (t, T, p, P), dtype)
        for local, index in enumerate(trtllm.layers_of(decoder, p, P)):
            own = trtllm.layer_tensors(layers[index], architecture, decoder, (t, T), dtype)
            tensors |= {f"transformer.layers.{local}.{name}": one for name, one in own.items()}
        save_tensors(tensors, folder / f"rank{p * T + t}.safetensors")
    config = trtllm.config(architecture, decoder, fmt, GROUP, "bfloat16", cut)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("family", "cut"), CUT_FAMILIES)
@pytest.mark.parametrize("name", FORMATS)
def test_an_export_reads_back_the_same_however_inference_cuts_it(tmp_path, name, family, cut):
    fmt = FORMATS[name]
    stream = random_stream(fmt, FAMILIES[family])
    write(tmp_path / "cut", fmt, stream, cut, family)
    assert check_contract(tmp_path / "cut") == []
    found = read_trtllm(tmp_path / "cut", FAMILIES[family].decoder_prefix)
    whole = by_name(stream)
    plain = {key: one for key, one in whole.items() if isinstance(one, torch.Tensor)}
    assert set(found.plain) == set(plain)
    assert all(torch.equal(found.plain[key], tensor) for key, tensor in plain.items())
    packed = {key.removesuffix(".weight"): whole[key] for key in set(whole) - set(plain)}
    assert set(found.linears) == set(packed)
    for key, one in packed.items():
        read = found.linears[key]
        scale = one.scale.reshape(-1, 1) if one.scale.dim() == 1 else one.scale
        if scale.dim() == 2 and scale.shape[1] > 1:
            scale = scale.repeat_interleave(GROUP, dim=1)
        value = one.codes.float() * scale
        if one.scale_2 is not None:
            value = (value / one.scale_2).to(torch.float8_e4m3fn).float() * one.scale_2
        assert torch.equal(read.weight, value), key
        for mine, theirs in ((read.prequant, one.prequant), (read.input_scale, one.input_scale)):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs), key


def test_kv_heads_are_repeated_where_there_are_fewer_than_ranks(tmp_path):
    fmt, T = FORMATS["fp8"], 8
    layers, ends = random_stream(fmt, FAMILIES["llava"])
    write(tmp_path / "cut", fmt, (layers, ends), (T, 1))
    codes = [part.codes.view(torch.uint8) for part in layers[1]["linear_qkv"].parts]
    for t in range(T):
        own = load_file(tmp_path / "cut" / f"rank{t}.safetensors")
        fused = own["transformer.layers.1.attention.qkv.weight"].view(torch.uint8)
        heads = (t, t // 2, t // 2)  # two ranks share a KV head
        for part, head, rows in zip(codes, heads, fused.split(32), strict=True):
            assert torch.equal(rows, part[32 * head : 32 * (head + 1)])


def test_repeated_kv_heads_that_differ_are_found(tmp_path):
    fmt = FORMATS["fp8"]
    write(tmp_path / "cut", fmt, random_stream(fmt, FAMILIES["llava"]), (8, 1))
    path = tmp_path / "cut" / "rank3.safetensors"
    tensors = load_file(path)
    tensors["transformer.layers.1.attention.qkv.weight"].view(torch.uint8)[-1, 0] ^= 0x40
    save_tensors(tensors, path)
    with pytest.raises(ProofError):
        read_trtllm(tmp_path / "cut", FAMILIES["llava"].decoder_prefix)
