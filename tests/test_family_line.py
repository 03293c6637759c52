"""All stages with each family on two tensor ranks, and the logits of each form of the model.

Models are random, in float32 on disk and bfloat16 from import on. The test is about the tensors:
exports are verified, and forms of the model are compared. Accuracy is tested by the quickstarts.
"""

import models
import pytest
import reference_gemma3
import reference_gemma4
import reference_internvl
import reference_llava_next
import reference_llava_onevision
import reference_mistral3
import reference_phi
import reference_qwen
import reference_smolvlm
import reference_vila
import torch
from processors import WRITERS
from rank_family_line import SOURCE_FORMS, readable, targets_of
from references import VOCAB
from safetensors.torch import load_file, save_file

from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.targets.registry import supported_targets
from nemo_vlm_ptq.workdir import store

REFERENCES = {
    "gemma3": (reference_gemma3.Gemma3(0), reference_gemma3.gemma3_cases),
    "gemma4": (reference_gemma4.Gemma4(0), reference_gemma4.gemma4_cases),
    "internvl": (reference_internvl.InternVL(0, "qwen2"), reference_internvl.internvl_cases),
    "llava_next": (
        reference_llava_next.LlavaNext(0, "mistral"),
        reference_llava_next.llava_next_cases,
    ),
    "llava_onevision": (
        reference_llava_onevision.LlavaOnevision(0),
        reference_llava_next.llava_next_cases,
    ),
    "phi": (reference_phi.Phi(0), reference_phi.phi_cases),
    "vila": (reference_vila.Vila(0), reference_vila.vila_cases),
    "mistral3": (
        reference_mistral3.Mistral3(0, "ministral3"),
        reference_mistral3.mistral3_cases,
    ),
    "smolvlm": (reference_smolvlm.SmolVLM(0, "idefics3"), reference_smolvlm.smolvlm_cases),
    "qwen2_vl": (reference_qwen.QwenVL(0, "qwen2_vl"), reference_qwen.qwen_cases),
    "qwen3_5": (reference_qwen.QwenVL(0, "qwen3_5"), reference_qwen.qwen_cases),
    "qwen3_vl": (reference_qwen.QwenVL(0, "qwen3_vl"), reference_qwen.qwen_cases),
}
TIMEOUT_S = 2700  # against a hang; every family in every format takes 10 minutes on two cores
BFLOAT16_TOLERANCE = 2.0**-5  # of logits near 1, with weights rounded to bfloat16
REMOTE_CODE_FILE = "processing_custom.py"
REMOTE_CODE = "raise SystemExit('code of a model folder was run')"


def question_and_logits(name):
    """Return the first question with an image, and the logits of the reference."""
    reference, make_cases = REFERENCES[name]
    question = make_cases(0, reference)["images"][0]
    return question, reference.logits(question)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the finished run of each family and the logits of each form."""
    home = tmp_path_factory.mktemp("runs")
    for name, write in WRITERS.items():
        write(home / name / "model")
        (home / name / "model" / REMOTE_CODE_FILE).write_text(REMOTE_CODE)
        question, _ = question_and_logits(name)
        tensors = {"input_ids": question.ids[None], "pixel_values": question.pixel_values}
        beside = ("image_sizes", "image_grid_thw", "pixel_attention_mask", "image_position_ids")
        for key in beside:
            if getattr(question, key) is not None:
                tensors[key] = getattr(question, key)
        save_file(tensors, home / name / "inputs.safetensors")
    command = [*models.main_command("rank_family_line"), home]
    code, _, err = models.launch_ranks(command, 2, TIMEOUT_S)
    assert code == 0, err[-3000:]
    return home


def test_every_family_but_llava_is_tested():
    assert sorted([*WRITERS, "llava"]) == sorted(FAMILIES)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_exports_of_every_format_are_verified(runs, name, fmt):
    result = store.read_json(runs / name / "work" / fmt / "verify.json")
    assert result["passed"]
    verified = {check["name"].split()[0] for check in result["checks"]}
    assert verified == set(supported_targets(FORMATS[fmt])) & set(targets_of(name))


@pytest.mark.parametrize("name", WRITERS)
def test_a_quantized_kv_cache_is_verified(runs, name):
    result = store.read_json(runs / name / "fp8" / "nvfp4" / "verify.json")
    assert result["passed"]
    names = [check["name"] for check in result["checks"]]
    expected = {"trtllm", "hf"} & set(targets_of(name))
    assert {f"{target} KV scales" for target in expected} <= set(names)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("target", ["hf", "compressed_tensors"])
def test_remote_code_of_a_model_folder_is_copied_and_not_run(runs, name, target):
    path = runs / name / "work" / "fp8" / target / REMOTE_CODE_FILE
    assert path.read_text() == REMOTE_CODE


@pytest.mark.parametrize("name", WRITERS)
def test_logits_of_every_form_match_the_reference_up_to_rounding(runs, name):
    _, expected = question_and_logits(name)
    logits = {
        form: load_file(runs / name / f"{form}.safetensors")["logits"]
        for form in (*SOURCE_FORMS, *readable(name))
    }
    assert all(tensor.shape == (1, len(expected), VOCAB) for tensor in logits.values())
    spread = max(1.0, float(expected.std()))  # of tied models: about 9
    torch.testing.assert_close(logits["hf_source"][0], expected, rtol=0, atol=1e-4 * spread)
    assert (logits["megatron"][0] - expected).abs().mean() < BFLOAT16_TOLERANCE * spread
    quantization_error = (logits["quantized"] - logits["megatron"]).abs().mean()
    for form in readable(name):
        assert (logits[form] - logits["quantized"]).abs().mean() < 1.5 * quantization_error
        assert torch.equal(logits[form], logits["hf"])


def test_vila_is_exported_in_subfolders(runs):
    folder = runs / "vila" / "work" / "fp8" / "hf"
    llm = store.read_json(folder / "llm" / "config.json")
    assert llm["architectures"] == ["LlamaForCausalLM"]
    assert llm["quantization_config"]["quant_algo"] == "FP8"
    assert all(
        name.startswith(("lm_head", "model.")) for name in llm["quantization_config"]["ignore"]
    )
    tower = load_file(folder / "vision_tower" / "model.safetensors")
    assert "vision_model.head.probe" in tower  # unused, but part of every export
    assert sorted(load_file(folder / "mm_projector" / "model.safetensors")) == [
        f"layers.{i}.{part}" for i in (1, 2, 4) for part in ("bias", "weight")
    ]
    assert (folder / "vision_tower" / "preprocessor_config.json").is_file()


def test_phi_is_exported_with_fused_names(runs):
    folder = runs / "phi" / "work" / "fp8" / "hf"
    names = set(store.read_json(folder / "model.safetensors.index.json")["weight_map"])
    for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        assert {f"model.layers.1.{name}.{part}" for part in ("weight", "weight_scale")} <= names
    layers = [name for name in names if name.startswith("model.layers.")]
    assert not [name for name in layers if "q_proj" in name or "up_proj" in name.split(".")]
    config = store.read_json(runs / "phi" / "work" / "fp8" / "trtllm" / "llm" / "config.json")
    assert config["architecture"] == "Phi3ForCausalLM"
    assert config["position_embedding_type"] == "long_rope"
