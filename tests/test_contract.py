"""Exported TensorRT-LLM checkpoints fulfil the loader's contract, and the limits of that contract.

Models are random. A vocabulary of 501 is not divisible by 2 or 4, and feature sizes allow groups of
128 on four ranks.
"""

import functools
import json
from dataclasses import replace

import encoded_models
import pytest
import torch
from encoded_models import random_model, write_trtllm
from safetensors.torch import load_file, save_file

from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.targets.registry import TARGETS
from nemo_vlm_ptq.targets.trtllm.contract import check_contract, run_contract_checks
from nemo_vlm_ptq.targets.trtllm.reader import read_trtllm

DECODER = Decoder(
    hidden=512,
    ffn=512,
    layers=2,
    heads=16,
    kv_heads=8,
    head_dim=32,
    vocab=501,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_positions=256,
)
DECODERS = {"llava": DECODER, "phi": replace(DECODER, long_rope=encoded_models.LONG_ROPE)}
# On 8 ranks two share a KV head, and each has one group of 128 input features.
FEW_KV_HEADS = replace(DECODER, hidden=1024, ffn=1024, layers=1, heads=8, kv_heads=4, head_dim=128)
FORMAT_NAMES = [None, *(name for name in FORMATS if name in TARGETS["trtllm"].formats)]
KV_CACHES = ("none", "fp8", "int8")
CASES = [
    (name, kv_cache)
    for name in FORMAT_NAMES
    for kv_cache in KV_CACHES
    if (name, kv_cache) != ("nvfp4", "int8")
]  # TensorRT-LLM has no kernels for nvfp4 with an int8 cache, and the plan rejects it
MLP = "transformer.layers.1.mlp."
EMBEDDING, HEAD = "transformer.vocab_embedding.weight", "lm_head.weight"


@functools.cache
def encoded_model(name, family="llava"):
    """Return a random model in a format, with groups of 128."""
    return random_model(FORMATS.get(name), family, DECODERS[family], 128)


def edit_config(folder, edit):
    """Apply a function that edits config.json in place."""
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("name", "kv_cache"), CASES)
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_export_passes(tmp_path, name, kv_cache, family, tensor):
    write_trtllm(tmp_path / "llm", encoded_model(name, family), (tensor, 1), kv_cache)
    assert check_contract(tmp_path / "llm") == []


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("layout", [(1, 2), (2, 2)])
def test_export_for_two_pipeline_stages_passes(tmp_path, name, layout):
    write_trtllm(tmp_path / "llm", encoded_model(name), layout, "fp8")
    assert check_contract(tmp_path / "llm") == []


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_replicated_kv_heads_pass(tmp_path, name):
    model = random_model(FORMATS.get(name), "llava", FEW_KV_HEADS, 128)
    write_trtllm(tmp_path / "llm", model, (8, 1))
    assert check_contract(tmp_path / "llm") == []


def test_nvfp4_with_int8_cache_is_rejected(tmp_path):
    write_trtllm(tmp_path / "llm", encoded_model("nvfp4"), (1, 1), "int8")
    assert check_contract(tmp_path / "llm") == [
        "config.json: unsupported kv_cache_quant_algo INT8 with NVFP4; supported: FP8, None"
    ]


@pytest.mark.parametrize(("tensor", "rows"), [(1, 501), (2, 251), (4, 126)])
def test_vocabulary_is_padded_with_zeros_for_sharding(tmp_path, tensor, rows):
    write_trtllm(tmp_path / "llm", encoded_model("fp8"), (tensor, 1))
    for name in (EMBEDDING, HEAD):
        shards = [
            load_file(tmp_path / "llm" / f"rank{rank}.safetensors")[name] for rank in range(tensor)
        ]
        assert [len(shard) for shard in shards] == [rows] * tensor
        padded = torch.cat(shards)
        assert padded[:501].any(dim=1).all() and not padded[501:].any()


def test_vocabulary_padded_by_the_writer_passes(tmp_path):
    """ModelOpt pads for AWQ: zero rows that vocab_size includes."""
    folder = tmp_path / "llm"
    write_trtllm(folder, encoded_model("int4_awq"), (2, 1))
    edit_config(folder, lambda config: config.update(vocab_size=512))
    for path in folder.glob("rank*"):
        tensors = load_file(path)
        for name in (EMBEDDING, HEAD):
            tensors[name] = torch.cat([tensors[name], tensors[name].new_zeros(5, 512)])
        save_file(tensors, path)
    assert check_contract(folder) == []


def test_excluded_modules_must_be_in_16_bit(tmp_path):
    folder, plain = tmp_path / "llm", tmp_path / "plain"
    write_trtllm(folder, encoded_model("int4_awq"), (2, 1))
    write_trtllm(plain, encoded_model(None), (2, 1))
    for path in folder.glob("rank*"):
        tensors = load_file(path)
        kept = {name: t for name, t in tensors.items() if not name.startswith(f"{MLP}proj")}
        weight = {f"{MLP}proj.weight": load_file(plain / path.name)[f"{MLP}proj.weight"]}
        save_file(kept | weight, path)
    assert check_contract(folder)
    edit_config(
        folder, lambda config: config["quantization"]["exclude_modules"].append("*1.mlp.proj")
    )
    assert check_contract(folder) == []


def test_embedding_sharded_along_features_or_replicated_passes(tmp_path):
    embedding = encoded_model("fp8").ends((0, 1))["word_embeddings"].parts[0]
    for dim, shards in ((1, embedding.chunk(2, dim=1)), (None, [embedding, embedding])):
        folder = tmp_path / str(dim)
        write_trtllm(folder, encoded_model("fp8"), (2, 1))
        setting = {"use_parallel_embedding": dim is not None, "embedding_sharding_dim": dim or 0}
        edit_config(folder, lambda config, setting=setting: config.update(setting))
        assert check_contract(folder)
        for rank, shard in enumerate(shards):
            path = folder / f"rank{rank}.safetensors"
            save_file(load_file(path) | {EMBEDDING: shard.contiguous().clone()}, path)
        assert check_contract(folder) == []


def test_tied_head_may_be_absent_if_config_says_so(tmp_path):
    folder = tmp_path / "llm"
    write_trtllm(folder, encoded_model("fp8"), (2, 1))
    for path in folder.glob("rank*"):
        save_file({name: t for name, t in load_file(path).items() if name != HEAD}, path)
    assert check_contract(folder) == [
        f"rank{rank}.safetensors: tensor {HEAD} is missing" for rank in range(2)
    ]
    edit_config(folder, lambda config: config.update(share_embedding_table=True))
    assert check_contract(folder) == []


def test_summary_names_defaults_of_the_loader(tmp_path):
    write_trtllm(tmp_path / "llm", encoded_model("fp8"), (2, 1))
    edit_config(tmp_path / "llm", lambda config: config.pop("rotary_base"))
    config_check = run_contract_checks(tmp_path / "llm")[0]
    assert config_check.findings == []
    assert config_check.about.endswith("TP 2 x PP 1, rotary_base is missing, the loader uses 10000")


def swap_gate_and_up(first, second):
    """Swap them on the second rank only."""
    for key in [key for key in second if key.startswith(f"{MLP}fc.")]:
        other = key.replace("fc.", "gate.")
        second[key], second[other] = second[other], second[key]


def swap_shards(first, second):
    for key in (f"{MLP}fc.weight", f"{MLP}gate.weight"):
        first[key], second[key] = second[key], first[key]


def shard_fused_weight_as_one(first, second):
    """Put all of Phi's up on the first rank and all of gate on the second."""
    key = f"{MLP}fc.weight"
    shards = [
        torch.cat(pair) for pair in zip(first[key].chunk(2), second[key].chunk(2), strict=True)
    ]
    first[key], second[key] = shards


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
        ("phi", shard_fused_weight_as_one),
    ],
)
def test_wrong_values_of_right_shape_pass(tmp_path, family, damage):
    """The stage verify detects them by comparison with the source."""
    folder, prefix = tmp_path / "llm", FAMILIES[family].decoder_prefix
    write_trtllm(folder, encoded_model("int8_sq", family), (2, 1))
    linears = read_trtllm(folder, prefix).linears
    before = {name: linear.dequantize().weight for name, linear in linears.items()}
    paths = sorted(folder.glob("rank*"))
    ranks = [load_file(path) for path in paths]
    damage(*ranks)
    for path, tensors in zip(paths, ranks, strict=True):
        save_file(tensors, path)
    assert check_contract(folder) == []
    after = read_trtllm(folder, prefix).linears
    assert any(
        not torch.equal(weight, after[name].dequantize().weight) for name, weight in before.items()
    )
