"""Every family through the whole line on two tensor ranks, and its logits in every form.

Models are random, in float32 on disk and bfloat16 from import on; what is learned from data is the
quickstarts' to show. Here every tensor has to arrive: exports are verified, and forms are compared.
"""

import models
import pytest
import reference_llava_next
import reference_phi
import reference_vila
import torch
from processors import WHOLE
from rank_family_line import FORMS, TARGETS
from references import VOCAB
from safetensors.torch import load_file, save_file

from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.workdir import store

REFERENCES = {
    "llava_next": (reference_llava_next.LlavaNext(0, "mistral"), reference_llava_next),
    "phi": (reference_phi.Phi(0), reference_phi),
    "vila": (reference_vila.Vila(0), reference_vila),
}
LONG = 900  # seconds for three families in every format
HALF = 2.0**-5  # of logits near 1, after weights were rounded to bfloat16


CODE = "processing_of_its_own.py"
TRAP = "raise SystemExit('code of a model folder was run')"


def question(name):
    """The first question with an image, and what the reference says to it."""
    model, module = REFERENCES[name]
    asked = getattr(module, f"{name}_cases")(0, model)["images"][0]
    return asked, model.ask(asked)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Folder of a folder for each family, the line run and every form asked."""
    home = tmp_path_factory.mktemp("lines")
    for name, write in WHOLE.items():
        write(home / name / "model")
        (home / name / "model" / CODE).write_text(TRAP)
        asked, _ = question(name)
        tensors = {"input_ids": asked.ids[None], "pixel_values": asked.pixel_values}
        if asked.image_sizes is not None:
            tensors["image_sizes"] = asked.image_sizes
        save_file(tensors, home / name / "inputs.safetensors")
    code, _, err = models.launch([*models.main_of("rank_family_line"), home], 2, LONG)
    assert code == 0, err[-3000:]
    return home


def test_every_family_but_llava_is_here():
    assert sorted([*WHOLE, "llava"]) == sorted(FAMILIES)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_of_every_family_is_verified(lines, name, fmt):
    result = store.read_json(lines / name / "work" / fmt / "verify.json")
    assert result["passed"]
    done = {check["name"].split()[0] for check in result["checks"]}
    assert done == set(FORMATS[fmt].targets) & set(TARGETS)


@pytest.mark.parametrize("name", WHOLE)
def test_a_rounded_kv_cache_of_every_family_is_verified(lines, name):
    result = store.read_json(lines / name / "fp8" / "nvfp4" / "verify.json")
    assert result["passed"]
    done = [check["name"] for check in result["checks"]]
    assert {"trtllm KV scales", "hf KV scales"} <= set(done)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("target", ["hf", "compressed_tensors"])
def test_code_of_a_model_folder_is_handed_on_and_not_run(lines, name, target):
    assert (lines / name / "work" / "fp8" / target / CODE).read_text() == TRAP


@pytest.mark.parametrize("name", WHOLE)
def test_logits_of_every_form_are_those_of_the_reference_up_to_rounding(lines, name):
    _, expected = question(name)
    found = {form: load_file(lines / name / f"{form}.safetensors")["logits"] for form in FORMS}
    assert all(one.shape == (1, len(expected), VOCAB) for one in found.values())
    torch.testing.assert_close(found["hf_source"][0], expected, rtol=0, atol=1e-4)
    assert (found["megatron"][0] - expected).abs().mean() < HALF
    rounding = (found["quantized"] - found["megatron"]).abs().mean()
    for form in TARGETS:
        assert (found[form] - found["quantized"]).abs().mean() < 1.5 * rounding
        assert torch.equal(found[form], found["hf"])


def test_the_parts_of_vila_are_folders_and_its_decoder_a_checkpoint(lines):
    folder = lines / "vila" / "work" / "fp8" / "hf"
    llm = store.read_json(folder / "llm" / "config.json")
    assert llm["architectures"] == ["LlamaForCausalLM"]
    assert llm["quantization_config"]["quant_algo"] == "FP8"
    assert all(
        name.startswith(("lm_head", "model.")) for name in llm["quantization_config"]["ignore"]
    )
    tower = load_file(folder / "vision_tower" / "model.safetensors")
    assert "vision_model.head.probe" in tower  # carried along, though nothing here uses it
    assert sorted(load_file(folder / "mm_projector" / "model.safetensors")) == [
        f"layers.{i}.{part}" for i in (1, 2, 4) for part in ("bias", "weight")
    ]
    assert (folder / "vision_tower" / "preprocessor_config.json").is_file()


def test_phi_is_exported_under_its_fused_names(lines):
    folder = lines / "phi" / "work" / "fp8" / "hf"
    names = set(store.read_json(folder / "model.safetensors.index.json")["weight_map"])
    for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        assert {f"model.layers.1.{name}.{part}" for part in ("weight", "weight_scale")} <= names
    layers = [name for name in names if name.startswith("model.layers.")]
    assert not [name for name in layers if "q_proj" in name or "up_proj" in name.split(".")]
    config = store.read_json(lines / "phi" / "work" / "fp8" / "trtllm" / "llm" / "config.json")
    assert config["architecture"] == "Phi3ForCausalLM"
    assert config["position_embedding_type"] == "long_rope"
