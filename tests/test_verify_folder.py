"""Contract checks of a whole checkpoint folder, and the command `verify DIR`."""

import json
import shutil

import pytest
import torch
from encoded_models import random_model, write_trtllm
from safetensors.torch import load_file, save_file
from test_cli import call
from test_contract import EMBEDDING, FEW_KV_HEADS, HEAD, edit_config, encoded_model
from test_contract_damage import KV_SCALE, LAYER, QKV, assert_findings, edit_rank

from nemo_vlm_ptq import commands
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.targets.trtllm.contract import check_contract

CHECKS = ("config", "files", "names", "shapes", "values", "ranks", "padding")
LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")


def rank_file(folder, rank):
    return folder / f"rank{rank}.safetensors"


def swap_files(first, second):
    first.rename(first.with_suffix(".swap"))
    second.rename(first)
    first.with_suffix(".swap").rename(second)


def test_missing_rank_file_is_reported(checkpoint):
    rank_file(checkpoint, 1).unlink()
    assert_findings(checkpoint, "rank1.safetensors is missing")


@pytest.mark.parametrize("name", ["rank2.safetensors", "model.safetensors"])
def test_unexpected_file_is_reported(checkpoint, name):
    shutil.copy(rank_file(checkpoint, 1), checkpoint / name)
    assert_findings(checkpoint, f"{name} is unexpected")


def test_truncated_file_is_reported(checkpoint):
    path = rank_file(checkpoint, 1)
    path.write_bytes(path.read_bytes()[:-7])
    assert_findings(
        checkpoint,
        "rank1.safetensors cannot be read: * is truncated: * bytes, its header expects *",
    )


def test_file_of_another_type_is_reported(checkpoint):
    rank_file(checkpoint, 0).write_bytes(b"PK\x03\x04" * 100)
    assert_findings(checkpoint, "rank0.safetensors cannot be read: *")


def test_swapped_rank_files_are_reported_by_their_padding(checkpoint):
    swap_files(rank_file(checkpoint, 0), rank_file(checkpoint, 1))
    assert_findings(
        checkpoint,
        f"rank1.safetensors: {HEAD} must be zero from row 250, after the vocabulary of 501",
        f"rank1.safetensors: {EMBEDDING} must be zero from row 250, *",
    )


def test_copied_rank_file_is_reported(checkpoint):
    shutil.copy(rank_file(checkpoint, 0), rank_file(checkpoint, 1))
    found = check_contract(checkpoint)
    message = "is sharded and must differ from that of the previous tensor-parallel rank"
    for layer in range(2):
        for module in LINEARS:
            tensor = f"transformer.layers.{layer}.{module}.weight"
            assert f"rank1.safetensors: {tensor} {message}" in found


@pytest.mark.parametrize("name", ["fp8", "int8_sq", "int4_awq"])
def test_wrong_replica_of_kv_head_is_reported(tmp_path, name):
    folder = tmp_path / "llm"
    write_trtllm(folder, random_model(FORMATS[name], "llava", FEW_KV_HEADS, 128), (8, 1))
    key = QKV.replace("1", "0") + "weight"
    other = load_file(rank_file(folder, 5))[key]
    edit_rank(folder, 3, lambda tensors: tensors.update({key: other}))
    assert_findings(
        folder,
        f"rank3.safetensors: {key} must hold the KV head of tensor-parallel rank 2: 2 ranks *",
    )


def test_swapped_pipeline_stages_are_reported(tmp_path):
    folder = tmp_path / "llm"
    write_trtllm(folder, encoded_model("fp8"), (1, 2))
    swap_files(rank_file(folder, 0), rank_file(folder, 1))
    assert_findings(
        folder,
        f"rank0.safetensors: tensor {EMBEDDING} is missing",
        f"rank0.safetensors: unexpected tensor {HEAD}",
        "rank0.safetensors: unexpected tensor transformer.ln_f.weight",
        f"rank1.safetensors: tensor {HEAD} is missing",
        "rank1.safetensors: tensor transformer.ln_f.weight is missing",
        f"rank1.safetensors: unexpected tensor {EMBEDDING}",
    )


def test_global_layer_numbers_are_reported(tmp_path):
    folder = tmp_path / "llm"
    write_trtllm(folder, encoded_model(None), (1, 2))

    def renumber(tensors):
        for name in [name for name in tensors if ".layers.0." in name]:
            tensors[name.replace(".0.", ".1.")] = tensors.pop(name)

    edit_rank(folder, 1, renumber)
    found = check_contract(folder)
    assert "rank1.safetensors: tensor transformer.layers.0.mlp.fc.weight is missing" in found
    assert "rank1.safetensors: unexpected tensor transformer.layers.1.mlp.fc.weight" in found


def test_command_prints_one_line_per_check(checkpoint, capsys):
    code, out, err = call(capsys, "verify", checkpoint)
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()] == [[name, "passed"] for name in CHECKS]
    assert "LlamaForCausalLM, FP8, KV cache FP8, TP 2 x PP 1" in out


def test_command_finds_checkpoint_in_llm_subfolder(checkpoint, capsys):
    shutil.copytree(checkpoint, checkpoint.parent / "trtllm" / "llm")
    expected = call(capsys, "verify", checkpoint)
    assert call(capsys, "verify", checkpoint.parent / "trtllm") == expected


def test_command_prints_findings_and_exits_with_3(checkpoint, capsys):
    edit_rank(checkpoint, 1, lambda tensors: tensors[KV_SCALE].fill_(-1))
    code, out, err = call(capsys, "verify", checkpoint)
    assert code == 3
    finding = f"rank1.safetensors: {KV_SCALE} must hold positive scales, got -1"
    assert f"values  FAILED  1 finding\n  {finding}\n" in out
    expected = f"nemo-vlm-ptq: error: verify {checkpoint}: values: {finding} (2 findings)\n"
    assert err == expected


def test_json_output_has_all_findings(checkpoint, capsys):
    rank_file(checkpoint, 1).unlink()
    save_file({"more": torch.ones(1)}, rank_file(checkpoint, 0))
    code, out, _ = call(capsys, "verify", checkpoint, "--json")
    result = json.loads(out)
    assert (code, result["passed"], result["folder"]) == (3, False, str(checkpoint))
    assert [check["name"] for check in result["checks"]] == list(CHECKS)
    findings = [finding for check in result["checks"] for finding in check["findings"]]
    assert findings == check_contract(checkpoint)
    code, out, _ = call(capsys, "verify", checkpoint)
    count = len(result["checks"][2]["findings"])
    assert f"\n  and {count - 10} more; --json prints all\n" in out


def test_folder_without_checkpoint_is_rejected(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    code, out, err = call(capsys, "verify", tmp_path)
    assert (code, out) == (2, "")
    assert f"error: {tmp_path} holds no TensorRT-LLM checkpoint: expected config.json" in err


def test_recipe_keys_are_rejected_for_a_folder(checkpoint, capsys):
    code, _, err = call(capsys, "verify", checkpoint, "export.tensor=4")
    assert code == 2
    assert err.endswith("verify DIR takes no recipe keys, got 'export.tensor=4'\n")


def test_recipe_name_takes_precedence_over_a_folder(checkpoint, monkeypatch, capsys):
    monkeypatch.chdir(checkpoint.parent)
    (checkpoint.parent / "quickstart").mkdir()
    monkeypatch.setattr(commands, "run_command", lambda *words, **_: print(words) or 0)
    expected = (0, "('verify', 'quickstart', [])\n", "")
    assert call(capsys, "verify", "quickstart") == expected
    code, _, err = call(capsys, "verify", "./quickstart")
    assert code == 2 and "holds no TensorRT-LLM checkpoint" in err


def test_a_folder_without_rank_files_is_not_searched_for_the_tensors_of_its_config(checkpoint):
    for path in checkpoint.glob("rank*"):
        path.unlink()
    edit_config(checkpoint, lambda config: config.update(num_hidden_layers=10**9))
    expected = "config.json: num_hidden_layers is 1000000000, a rank file holds 0 tensors"
    assert check_contract(checkpoint) == [expected]


def test_pruned_linears_pass(tmp_path):
    write_trtllm(tmp_path / "llm", encoded_model("int4_awq"), (2, 1))
    key = f"{LAYER}mlp.fc."

    def prune(tensors):
        tensors[f"{key}weight"].zero_()
        tensors[f"{key}weights_scaling_factor"].fill_(1 / 7)

    for rank in range(2):
        edit_rank(tmp_path / "llm", rank, prune)
    assert check_contract(tmp_path / "llm") == []
