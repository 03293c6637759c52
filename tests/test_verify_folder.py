"""A checkpoint folder as a whole: its files, its ranks against each other, and `verify DIR`."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from streams import random_stream, write_trtllm
from test_cli import call
from test_contract import FEW, configure, stream
from test_contract_damage import EMBEDDING, HEAD, KV, LAYER, QKV, change, refusal

from nemo_vlm_ptq import commands as launch
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.targets.trtllm.contract import check_contract

CHECKS = ("config", "files", "names", "shapes", "values", "ranks", "padding")


@pytest.fixture
def cut(tmp_path):
    """A checkpoint in fp8 for two tensor ranks with an fp8 KV cache."""
    write_trtllm(tmp_path / "cut", stream("fp8"), (2, 1), "fp8")
    return tmp_path / "cut"


def rank(folder, number):
    return folder / f"rank{number}.safetensors"


def exchange(first, second):
    first.rename(first.with_suffix(".away"))
    second.rename(first)
    first.with_suffix(".away").rename(second)


def test_a_missing_rank_file_is_refused(cut):
    rank(cut, 1).unlink()
    refusal(cut, "rank1.safetensors is missing")


@pytest.mark.parametrize("name", ["rank2.safetensors", "model.safetensors"])
def test_a_file_too_many_is_refused(cut, name):
    shutil.copy(rank(cut, 1), cut / name)
    refusal(cut, f"{name} does not belong here")


def test_a_truncated_file_is_refused(cut):
    rank(cut, 1).write_bytes(rank(cut, 1).read_bytes()[:-7])
    refusal(cut, "rank1.safetensors cannot be read: * is truncated: * bytes, its header asks for *")


def test_a_file_of_something_else_is_refused(cut):
    rank(cut, 0).write_bytes(b"PK\x03\x04" * 100)
    refusal(cut, "rank0.safetensors cannot be read: *")


def test_exchanged_ranks_are_refused_where_the_vocabulary_is_odd(cut):
    exchange(rank(cut, 0), rank(cut, 1))
    refusal(
        cut,
        f"rank1.safetensors: {HEAD} must hold zeros from row 250 on, where the vocabulary of 501 *",
        f"rank1.safetensors: {EMBEDDING} must hold zeros from row 250 on, *",
    )


def test_the_file_of_one_rank_in_the_place_of_another_is_refused(cut):
    shutil.copy(rank(cut, 0), rank(cut, 1))
    found = check_contract(cut)
    own = "is that of the tensor rank before, each must hold its own share"
    for layer in range(2):
        for module in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"):
            place = f"rank1.safetensors: transformer.layers.{layer}.{module}.weight"
            assert f"{place} {own}" in found


@pytest.mark.parametrize("name", ["fp8", "int8_sq", "int4_awq"])
def test_kv_heads_that_are_not_repeated_rightly_are_refused(tmp_path, name):
    folder = tmp_path / "cut"
    write_trtllm(folder, random_stream(FORMATS[name], "llava", FEW, 128), (8, 1))
    key = QKV.replace("1", "0") + "weight"
    change(folder, 3, lambda own: own.update({key: load_file(rank(folder, 5))[key]}))
    refusal(folder, f"rank3.safetensors: {key} has another KV head than tensor rank 2, 2 ranks *")


def test_exchanged_pipeline_stages_are_refused(tmp_path):
    write_trtllm(tmp_path / "cut", stream("fp8"), (1, 2))
    exchange(rank(tmp_path / "cut", 0), rank(tmp_path / "cut", 1))
    refusal(
        tmp_path / "cut",
        f"rank0.safetensors: {EMBEDDING} is missing",
        f"rank0.safetensors: {HEAD} is extra",
        "rank0.safetensors: transformer.ln_f.weight is extra",
        f"rank1.safetensors: {HEAD} is missing",
        "rank1.safetensors: transformer.ln_f.weight is missing",
        f"rank1.safetensors: {EMBEDDING} is extra",
    )


def test_layers_counted_over_all_pipeline_stages_are_refused(tmp_path):
    write_trtllm(tmp_path / "cut", stream(None), (1, 2))

    def count_on(tensors):
        for name in [name for name in tensors if ".layers.0." in name]:
            tensors[name.replace(".0.", ".1.")] = tensors.pop(name)

    change(tmp_path / "cut", 1, count_on)
    found = check_contract(tmp_path / "cut")
    assert "rank1.safetensors: transformer.layers.0.mlp.fc.weight is missing" in found
    assert "rank1.safetensors: transformer.layers.1.mlp.fc.weight is extra" in found


@pytest.mark.parametrize(
    ("name", "edit", "expected"),
    [
        ("int4_awq", {"group_size": 64}, "has shape [256, 4], not [256, 8]"),
        ("int4_awq", {"quant_algo": "W4A8_AWQ"}, "activation_scaling_factor is missing"),
        ("fp8", {"quant_algo": None}, "has dtype F8_E4M3, not BF16"),
        ("fp8", {"kv_cache_quant_algo": None}, "kv_cache_scaling_factor is extra"),
        ("nvfp4", {"quant_algo": "FP8"}, "has dtype U8, not F8_E4M3"),
        ("w4a8_awq", {"quant_algo": "W4A16_AWQ"}, "activation_scaling_factor is extra"),
    ],
)
def test_a_config_of_another_format_is_refused(tmp_path, name, edit, expected):
    write_trtllm(tmp_path / "cut", stream(name), (2, 1), "fp8")
    configure(tmp_path / "cut", lambda config: config["quantization"].update(edit))
    assert any(finding.endswith(expected) for finding in check_contract(tmp_path / "cut"))


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ({"vocab_size": 500}, f"{HEAD} has shape [251, 512], not [250, 512]"),
        ({"num_hidden_layers": 3}, "transformer.layers.2.mlp.fc.weight is missing"),
        ({"num_hidden_layers": 1}, f"{LAYER}mlp.fc.weight is extra"),
        ({"num_key_value_heads": 4}, f"{QKV}weight has shape [512, 512], not [384, 512]"),
        ({"architecture": "Phi3ForCausalLM", "hidden_act": "swiglu", "rotary_pct": 1.0},
         f"{LAYER}mlp.gate.weight is extra"),
    ],
)  # fmt: skip
def test_a_config_of_another_model_is_refused(cut, edit, expected):
    configure(cut, lambda config: config.update(edit))
    assert f"rank1.safetensors: {expected}" in check_contract(cut)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda own: own.pop("rotary_pct"), "rotary_pct is missing; Phi3ForCausalLM reads it"),
        (lambda own: own.pop("longrope_scaling_long_factors"),
         "longrope_scaling_long_factors is missing"),
        (lambda own: own.update(longrope_scaling_short_factors=[1.0] * 15),
         "longrope_scaling_short_factors must hold 16 factors above 0"),
        (lambda own: own.update(original_max_position_embeddings=512),
         "original_max_position_embeddings is 512, not between 1 and max_position_embeddings 256"),
        (lambda own: own.update(hidden_act="silu"),
         "hidden_act 'silu' is not known; known: swiglu"),
        (lambda own: own["mapping"].update(pp_size=2, world_size=4),
         "Phi3ForCausalLM has no pipeline parallelism, pp_size must be 1"),
    ],
)  # fmt: skip
def test_a_config_that_misreads_phi_is_refused(tmp_path, edit, expected):
    write_trtllm(tmp_path / "cut", stream("fp8", "phi"), (2, 1))
    configure(tmp_path / "cut", edit)
    refusal(tmp_path / "cut", f"config.json: {expected}")


def test_the_scale_of_a_kv_cache_is_the_larger_one_of_keys_and_values(cut):
    own = [KV.replace("kv_", f"{part}_") for part in "kv"]

    def pair(key, value):
        return lambda tensors: tensors.update(
            {name: tensors[KV] * share for name, share in zip(own, (key, value), strict=True)}
        )

    for number in range(2):
        change(cut, number, pair(0.5, 1.0))
    assert check_contract(cut) == []
    for number in range(2):
        change(cut, number, pair(0.5, 0.75))
    refusal(cut, f"rank0.safetensors: {KV} must be the larger one of keys and of values")


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "null"])
def test_a_config_that_is_no_object_is_refused(cut, text):
    (cut / "config.json").write_text(text)
    assert len(check_contract(cut)) == 1


def test_the_command_prints_a_line_for_each_check(cut, capsys):
    code, out, err = call(capsys, "verify", cut)
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()] == [[name, "passed"] for name in CHECKS]
    assert "LlamaForCausalLM, FP8, KV cache FP8, TP 2 x PP 1" in out


def test_the_command_finds_the_checkpoint_of_an_export(cut, capsys):
    shutil.copytree(cut, cut.parent / "trtllm" / "llm")
    assert call(capsys, "verify", cut.parent / "trtllm") == call(capsys, "verify", cut)


def test_a_finding_is_printed_and_ends_the_command_with_3(cut, capsys):
    change(cut, 1, lambda tensors: tensors[KV].fill_(-1))
    code, out, err = call(capsys, "verify", cut)
    assert code == 3
    first = f"rank1.safetensors: {KV} holds the scale -1, every scale must be above 0"
    assert f"values  FAILED  1 finding\n  {first}\n" in out
    assert err == f"nemo-vlm-ptq: error: verify {cut}: values: {first} (2 findings)\n"


def test_all_findings_are_given_as_json(cut, capsys):
    rank(cut, 1).unlink()
    save_file({"more": torch.ones(1)}, rank(cut, 0))
    code, out, _ = call(capsys, "verify", cut, "--json")
    found = json.loads(out)
    assert (code, found["passed"], found["folder"]) == (3, False, str(cut))
    assert [check["name"] for check in found["checks"]] == list(CHECKS)
    assert [one for check in found["checks"] for one in check["findings"]] == check_contract(cut)
    code, out, _ = call(capsys, "verify", cut)
    count = len(found["checks"][2]["findings"])
    assert f"\n  and {count - 10} more; --json gives all\n" in out


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    code, out, err = call(capsys, "verify", tmp_path)
    assert (code, out) == (2, "")
    assert f"error: {tmp_path} holds no TensorRT-LLM checkpoint: it needs config.json" in err


def test_recipe_keys_make_no_sense_for_a_folder(cut, capsys):
    code, _, err = call(capsys, "verify", cut, "export.tensor=4")
    assert code == 2
    assert err.endswith("verify DIR takes no recipe keys, got 'export.tensor=4'\n")


def test_a_recipe_that_is_called_like_a_folder_is_still_verified(cut, monkeypatch, capsys):
    monkeypatch.chdir(cut.parent)
    (cut.parent / "quickstart").mkdir()
    monkeypatch.setattr(launch, "start", lambda *words, **_: print(words) or 0)
    expected = (0, "('verify', 'quickstart', [])\n", "")
    assert call(capsys, "verify", "quickstart") == expected
    code, _, err = call(capsys, "verify", "./quickstart")
    assert code == 2 and "holds no TensorRT-LLM checkpoint" in err
