"""Every TensorRT-LLM checkpoint that we write keeps the contract, and what the contract cannot see.

Random weights, no model: what is packed goes through the exporter's functions into files. 501 words
fit no number of ranks but one, and features are as many as group-wise linears need on four ranks.
"""

import functools
import json
from dataclasses import replace

import pytest
import streams
import torch
from safetensors.torch import load_file, save_file
from streams import random_stream, write_trtllm

from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.families.base import Decoder
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.targets.trtllm.contract import check_contract, contract_checks
from nemo_vlm_ptq.targets.trtllm.reader import read_trtllm

DECODER = Decoder(512, 512, 2, 16, 8, 32, 501, 1e-5, 1e4, 256)
DECODERS = {"llava": DECODER, "phi": replace(DECODER, long_rope=streams.ROPE)}
# One KV head for two ranks; rows of 128 features for each of them.
FEW = Decoder(1024, 1024, 1, 8, 4, 128, 501, 1e-5, 1e4, 256)
NAMES = [None, *(name for name, row in FORMATS.items() if "trtllm" in row.targets)]
CACHES = ("none", "fp8", "int8")
CASES = [
    (name, kv) for name in NAMES for kv in CACHES if (name, kv) != ("nvfp4", "int8")
]  # TensorRT-LLM has no engine of nvfp4 with an int8 cache, and plan refuses it
MLP = "transformer.layers.1.mlp."


@functools.cache
def stream(name, family="llava"):
    """A random model in a format, groups of 128."""
    return random_stream(FORMATS.get(name), family, DECODERS[family], 128)


@pytest.mark.parametrize(("name", "kv"), CASES)
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_every_export_keeps_the_contract(tmp_path, name, kv, family, tensor):
    write_trtllm(tmp_path / "cut", stream(name, family), (tensor, 1), kv)
    assert check_contract(tmp_path / "cut") == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", [(1, 2), (2, 2)])
def test_every_export_in_two_stages_keeps_the_contract(tmp_path, name, cut):
    write_trtllm(tmp_path / "cut", stream(name), cut, "fp8")
    assert check_contract(tmp_path / "cut") == []


@pytest.mark.parametrize("name", NAMES)
def test_repeated_kv_heads_keep_the_contract(tmp_path, name):
    write_trtllm(tmp_path / "cut", random_stream(FORMATS.get(name), "llava", FEW, 128), (8, 1))
    assert check_contract(tmp_path / "cut") == []


def test_nvfp4_with_an_int8_cache_is_refused_by_name(tmp_path):
    write_trtllm(tmp_path / "cut", stream("nvfp4"), (1, 1), "int8")
    assert check_contract(tmp_path / "cut") == [
        "config.json: kv_cache_quant_algo INT8 does not go with NVFP4; known: FP8, None"
    ]


@pytest.mark.parametrize(("tensor", "rows"), [(1, 501), (2, 251), (4, 126)])
def test_an_odd_vocabulary_is_shared_out_with_zeros_at_its_end(tmp_path, tensor, rows):
    write_trtllm(tmp_path / "cut", stream("fp8"), (tensor, 1))
    for name in ("transformer.vocab_embedding.weight", "lm_head.weight"):
        parts = [
            load_file(tmp_path / "cut" / f"rank{rank}.safetensors")[name] for rank in range(tensor)
        ]
        assert [len(part) for part in parts] == [rows] * tensor
        whole = torch.cat(parts)
        assert whole[:501].any(dim=1).all() and not whole[501:].any()


def test_a_vocabulary_that_its_writer_padded_keeps_the_contract(tmp_path):
    """As modelopt does for AWQ: zeros, and a vocab_size that counts them."""
    folder = tmp_path / "cut"
    write_trtllm(folder, stream("int4_awq"), (2, 1))
    configure(folder, lambda config: config.update(vocab_size=512))
    for path in folder.glob("rank*"):
        tensors = load_file(path)
        for name in ("transformer.vocab_embedding.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name].new_zeros(5, 512)])
        save_file(tensors, path)
    assert check_contract(folder) == []


def test_modules_that_the_config_excludes_are_in_16_bit(tmp_path):
    folder = tmp_path / "cut"
    write_trtllm(folder, stream("int4_awq"), (2, 1))
    plain = tmp_path / "plain"
    write_trtllm(plain, stream(None), (2, 1))
    for path in folder.glob("rank*"):
        kept = {
            name: one for name, one in load_file(path).items() if not name.startswith(f"{MLP}proj")
        }
        save_file(
            kept | {f"{MLP}proj.weight": load_file(plain / path.name)[f"{MLP}proj.weight"]}, path
        )
    assert check_contract(folder)
    configure(
        folder, lambda config: config["quantization"]["exclude_modules"].append("*1.mlp.proj")
    )
    assert check_contract(folder) == []


def configure(folder, change):
    """Pass config.json through a function that changes it in place."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_features_cut_in_the_embedding_or_not_at_all_keep_the_contract(tmp_path):
    name = "transformer.vocab_embedding.weight"
    whole = stream("fp8").ends((0, 1))["word_embeddings"].parts[0]
    for dim, parts in ((1, whole.chunk(2, dim=1)), (None, [whole, whole])):
        folder = tmp_path / str(dim)
        write_trtllm(folder, stream("fp8"), (2, 1))
        setting = {"use_parallel_embedding": dim is not None, "embedding_sharding_dim": dim or 0}
        configure(folder, lambda config, setting=setting: config.update(setting))
        assert check_contract(folder)
        for rank, part in enumerate(parts):
            path = folder / f"rank{rank}.safetensors"
            save_file(load_file(path) | {name: part.contiguous().clone()}, path)
        assert check_contract(folder) == []


def test_a_head_that_is_the_embedding_may_be_left_out_where_the_config_says_so(tmp_path):
    folder = tmp_path / "cut"
    write_trtllm(folder, stream("fp8"), (2, 1))
    for path in folder.glob("rank*"):
        save_file({k: v for k, v in load_file(path).items() if k != "lm_head.weight"}, path)
    assert check_contract(folder) == [
        f"rank{rank}.safetensors: lm_head.weight is missing" for rank in range(2)
    ]
    configure(folder, lambda config: config.update(share_embedding_table=True))
    assert check_contract(folder) == []


def test_a_config_names_what_it_leaves_to_the_loader(tmp_path):
    write_trtllm(tmp_path / "cut", stream("fp8"), (2, 1))
    configure(tmp_path / "cut", lambda config: config.pop("rotary_base"))
    first = contract_checks(tmp_path / "cut")[0]
    assert first.findings == []
    assert first.about.endswith("TP 2 x PP 1, rotary_base is not given: 10000")


def swap_gate_and_up(first, second):
    """On the second rank alone."""
    for key in [key for key in second if key.startswith(f"{MLP}fc.")]:
        other = key.replace("fc.", "gate.")
        second[key], second[other] = second[other], second[key]


def swap_shards(first, second):
    for key in (f"{MLP}fc.weight", f"{MLP}gate.weight"):
        first[key], second[key] = second[key], first[key]


def halve_fused(first, second):
    """Phi's fused tensor cut as one: all of up on the first rank, all of gate on the second."""
    key = f"{MLP}fc.weight"
    whole = [
        torch.cat(pair) for pair in zip(first[key].chunk(2), second[key].chunk(2), strict=True)
    ]
    first[key], second[key] = whole


def change_code(first, second):
    first[f"{MLP}proj.weight"][3, 3] ^= 1


def double_scale(first, second):
    for tensors in (first, second):
        tensors[f"{MLP}proj.weights_scaling_factor"] *= 2


@pytest.mark.parametrize(
    ("family", "damage"),
    [
        ("llava", swap_gate_and_up),
        ("llava", swap_shards),
        ("llava", change_code),
        ("llava", double_scale),
        ("phi", halve_fused),
    ],
)
def test_wrong_values_of_the_right_kind_cannot_be_seen_from_the_folder(tmp_path, family, damage):
    """The stage verify sees them: it holds dequantized weights against the source."""
    folder, prefix = tmp_path / "cut", FAMILIES[family].decoder_prefix
    write_trtllm(folder, stream("int8_sq", family), (2, 1))
    linears = read_trtllm(folder, prefix).linears
    before = {name: one.values().weight for name, one in linears.items()}
    paths = sorted(folder.glob("rank*"))
    tensors = [load_file(path) for path in paths]
    damage(*tensors)
    for path, own in zip(paths, tensors, strict=True):
        save_file(own, path)
    assert check_contract(folder) == []
    after = read_trtllm(folder, prefix)
    assert any(
        not torch.equal(one, after.linears[name].values().weight) for name, one in before.items()
    )
