"""The stage verify passes an undamaged export, and ends with a finding on a damaged one."""

import shutil

import pytest
import torch
from conftest import Export, verifier
from test_verify import LAYER, VISION, flip_bit

from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.verify import model_forms as forms
from nemo_vlm_ptq.workdir import store


def test_the_stage_passes_every_check_of_an_undamaged_export(verification):
    result = verification[0]()
    assert result["passed"] and all(check["passed"] for check in result["checks"])
    assert {check["name"].split()[0] for check in result["checks"]} == {"trtllm", "hf"}


def test_each_model_is_loaded_once_for_all_formats_and_targets(works, tmp_path, monkeypatch):
    formats, asked = ["fp8", "int8_sq"], []
    for name in ("megatron", *formats):
        shutil.copytree(works["2x1x1"] / name, tmp_path / name)

    def counting(real):
        def load(*given):
            asked.append(given)
            return real(*given)

        return load

    for name in ("load_model", "load_quantized"):
        monkeypatch.setattr(forms, name, counting(getattr(forms, name)))
    assert verifier(tmp_path, formats)()["passed"]
    assert sorted(what.name for _, what in asked) == [*formats, "megatron"]


def test_damage_done_after_the_stage_passed_is_found_when_it_runs_again(verification):
    run, folder = verification
    run()
    Export(folder / "trtllm", "trtllm").change(flip_bit, VISION)
    with pytest.raises(VerificationError, match="was changed after it was written"):
        run()


def test_a_doubled_activation_scale_is_found(verification):
    run, folder = verification
    damaged = Export(folder / "trtllm", "trtllm")
    key = LAYER["trtllm"] + "mlp.proj.activation_scaling_factor"
    damaged.change(lambda tensors: tensors[key].mul_(2))
    damaged.sign()
    with pytest.raises(VerificationError):
        run()


def lose_vision(folder):
    (folder / "trtllm" / VISION).unlink()


def lose_hf_scale(folder):
    Export(folder / "hf", "hf").change(
        lambda tensors: tensors.pop(LAYER["hf"] + "mlp.down_proj.weight_scale")
    )


def add_to_hf(folder):
    Export(folder / "hf", "hf").change(lambda tensors: tensors.update(more=torch.zeros(3)))


def add_to_vision(folder):
    change = {"more": torch.zeros(3)}
    Export(folder / "trtllm", "trtllm").change(lambda tensors: tensors.update(change), VISION)


def lose_mapping(folder):
    Export(folder / "trtllm", "trtllm").configure(lambda config: config.pop("mapping"))


@pytest.mark.parametrize(
    "damage", [lose_vision, lose_hf_scale, add_to_hf, add_to_vision, lose_mapping]
)
def test_damage_ends_the_stage_with_a_finding_and_not_with_a_bug(verification, damage):
    run, folder = verification
    damage(folder)
    with pytest.raises(VerificationError):
        run()
    assert not store.read_json(folder / "verify.json")["passed"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("trtllm/llm/config.json", {"rotary_base": 500000.0}),
        ("hf/hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}),
        ("hf/model.safetensors.index.json", {"weight_map": {}}),
    ],
)
def test_a_config_that_serves_another_model_is_found(verification, name, change):
    run, folder = verification
    target, _, file = name.partition("/")
    damaged = Export(folder / target, target)
    damaged.configure(lambda config: config.update(change), file)
    damaged.sign()
    with pytest.raises(VerificationError):
        run()
