"""The stage verify passes an undamaged export, and ends with a finding on a damaged one."""

import shutil

import pytest
import torch
from conftest import Export, verifier
from test_verify import LAYER, VISION, flip_bit

from nemo_vlm_ptq.checkpoints.torch_dist_index import read_index
from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.verify import model_forms as forms
from nemo_vlm_ptq.workdir import store


def test_the_stage_passes_every_check_of_an_undamaged_export(verification):
    result = verification[0]()
    assert result["passed"] and all(check["passed"] for check in result["checks"])
    assert {check["name"].split()[0] for check in result["checks"]} == {"trtllm", "hf"}


def test_each_model_is_made_once_for_all_formats_and_targets(works, tmp_path, monkeypatch):
    formats, made = ["fp8", "int8_sq"], []
    for name in formats:
        shutil.copytree(works["2x1x1"] / name, tmp_path / name)
    build_quantized, load_from_source = forms.build_quantized, forms.load_from_source

    def build(context, fmt, window):
        made.append((fmt.name, window))
        return build_quantized(context, fmt, window)

    def load(model, *given):
        made.append(("source", range(len(model.decoder.layers))))
        return load_from_source(model, *given)

    monkeypatch.setattr(forms, "build_quantized", build)
    monkeypatch.setattr(forms, "load_from_source", load)
    assert verifier(tmp_path, formats)()["passed"]
    assert sorted(made) == [(name, range(4)) for name in (*formats, "source")]


def test_the_models_may_be_made_window_by_window(works, tmp_path, monkeypatch):
    shutil.copytree(works["2x1x1"] / "fp8", tmp_path / "fp8")
    expected = verifier(tmp_path, ["fp8"])()
    (tmp_path / "fp8" / "verify.json").unlink()
    monkeypatch.setattr(forms, "layers_in_memory", lambda *_: 1)
    assert verifier(tmp_path, ["fp8"])() == expected


@pytest.mark.parametrize("name", ["w4a8_awq", "nf4"])
def test_a_megatron_checkpoint_is_verified(works, tmp_path, name):
    shutil.copytree(works["2x1x1"] / name, tmp_path / name)
    run = verifier(tmp_path, [name], ("megatron",))
    result = run()
    assert result["passed"] and set(result["logits"]) == {"megatron"}
    checks = [check["name"] for check in result["checks"]]
    assert checks == ["megatron files", "megatron logits"]


def test_a_changed_weight_of_a_megatron_checkpoint_is_found_by_hash_and_by_logits(works, tmp_path):
    shutil.copytree(works["2x1x1"] / "fp8", tmp_path / "fp8")
    run, folder = verifier(tmp_path, ["fp8"], ("megatron",)), tmp_path / "fp8" / "quantized"
    key = "decoder.layers.1.mlp.linear_fc2.weight"
    place = read_index(folder).tensors[key].chunks[0].byte_range
    raw = bytearray(place.file.read_bytes())
    middle = place.offset + place.length // 2
    raw[middle : middle + 256] = bytes(256)
    place.file.write_bytes(raw)
    with pytest.raises(VerificationError, match=r"megatron files: .*was changed"):
        run()
    Export(folder, "megatron").sign()
    with pytest.raises(VerificationError, match="megatron logits: logits differ by"):
        run()


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
