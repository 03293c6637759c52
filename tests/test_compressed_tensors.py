"""compressed-tensors exports: verification, loading by transformers, and damage.

All stages run on the trained tiny model, in which two query heads share a KV head.
"""

import shutil

import models
import pytest
import torch
from conftest import Export
from fake_gpu import check_linears_on_device
from safetensors.torch import load_file

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX, load_questions
from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.families import llava
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.stages import run_stages
from nemo_vlm_ptq.stages.verify import verify
from nemo_vlm_ptq.targets.compressed_tensors.config import ignore_patterns
from nemo_vlm_ptq.targets.compressed_tensors.reader import read_compressed_tensors
from nemo_vlm_ptq.targets.registry import TARGETS
from nemo_vlm_ptq.verify.model_forms import load_reference_model, reference_logits
from nemo_vlm_ptq.verify.target import TargetVerifier
from nemo_vlm_ptq.verify.unfolding import unfold
from nemo_vlm_ptq.workdir import store

TARGET = "compressed_tensors"
FORMAT_NAMES = [name for name in FORMATS if name in TARGETS[TARGET].formats]
KV_FORMAT_NAMES = ("fp8", "int8_sq", "int4_awq")  # verified with an fp8 KV cache too
LAYER = "language_model.model.layers.1."
# Mean distance of transformers' logits, in standard deviations: transformers multiplies packed
# weights in bfloat16, and implements neither W4A8's second rounding nor nvfp4's input blocks.
TOLERANCE = {"fp8": 1e-5, "fp8_pc_pt": 1e-5, "int8_sq": 1e-5, "w4a8_awq": 0.05, "nvfp4": 0.1}


def make_context(parallel, workdir, names, kv_cache="none"):
    recipe = Recipe(
        model=str(models.TINY_LLAVA),
        workdir=str(workdir),
        quantize={"format": names, "kv_cache": kv_cache},
        calibration={"data": "scenes", "samples": 24, "micro_batch": 8},
        export={"targets": (TARGET,)},
    )
    return RunContext(plan=make_plan(recipe), parallel=parallel)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A work folder with all formats, and in `cached` one with an fp8 KV cache."""
    workdir = tmp_path_factory.mktemp("workdir")
    stages = ("observe", "solve", "export", "verify")
    with models.single_rank() as parallel:
        run_stages(make_context(parallel, workdir, tuple(FORMAT_NAMES)), stages)
        run_stages(make_context(parallel, workdir / "cached", KV_FORMAT_NAMES, "fp8"), stages)
    return workdir


def check_details(path):
    """Return the details of all checks by name."""
    return {check["name"]: check["detail"] for check in store.read_json(path)["checks"]}


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_all_formats_are_verified(workdir, name):
    found = check_details(workdir / name / "verify.json")
    checks = ("configs", "coverage", "untouched", "logits")
    assert {f"{TARGET} {check}" for check in checks} <= set(found)
    static = FORMATS[name].activation in ("fp8", "int8", "nvfp4") and name != "w4a8_awq"
    assert (f"{TARGET} input scales" in found) == static
    scaled = 8 if FORMATS[name].uses_pre_quant_scale else 0  # two norms a layer
    assert found[f"{TARGET} untouched"].endswith(f"{scaled} norms scaled")


@pytest.mark.parametrize("name", KV_FORMAT_NAMES)
def test_quantized_kv_cache_is_verified(workdir, name):
    assert f"{TARGET} KV scales" in check_details(workdir / "cached" / name / "verify.json")
    names = set(load_file(next((workdir / "cached" / name / TARGET).glob("*.safetensors"))))
    assert {f"{LAYER}self_attn.{part}_scale" for part in "kv"} <= names


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_library_accepts_the_quantization_config(workdir, name):
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    config = store.read_json(workdir / name / TARGET / "config.json")["quantization_config"]
    read = QuantizationConfig.model_validate(config)
    assert read.quantization_status == QuantizationStatus.COMPRESSED
    (scheme,) = read.config_groups.values()
    assert scheme.weights.num_bits == {"fp8": 8, "int8": 8}.get(FORMATS[name].weight, 4)
    assert read.ignore == [
        f"re:.*{part}.*" for part in ("embed_tokens", "lm_head", "multi_modal_projector",
                                      "vision_tower")
    ]  # fmt: skip


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_linears_are_decoded_on_a_gpu(workdir, name, monkeypatch):
    read = read_compressed_tensors(workdir / name / TARGET, llava.FAMILY)
    with models.single_rank() as parallel:
        context = make_context(parallel, workdir, (name,))
        verifier = TargetVerifier(context, FORMATS[name], TARGET, expected=None)
        folds = verifier._find_folds()
    check_linears_on_device(unfold(read.linears, folds), monkeypatch)


@pytest.fixture
def transformers_loader(monkeypatch):
    """Return a loader that works around a bug of transformers 5.13 and 5.14.

    They take every scale for one of a mixture of experts.
    """
    from transformers import CompressedTensorsConfig, LlavaForConditionalGeneration
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    monkeypatch.setattr(CompressedTensorsHfQuantizer, "get_weight_conversions", lambda self: [])

    def load(folder):
        model = LlavaForConditionalGeneration.from_pretrained(
            folder, quantization_config=CompressedTensorsConfig(run_compressed=False)
        )
        return torch.nn.Module.float(model)  # transformers' float() rejects quantized models

    return load


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_transformers_and_reference_model_agree(workdir, transformers_loader, name):
    model = transformers_loader(workdir / name / TARGET)
    with models.single_rank() as parallel:
        context = make_context(parallel, workdir, (name,))
        plan = context.plan
        questions = load_questions("scenes", "test", 2)
        preprocess = plan.family.make_preprocessor(plan.folder, plan.config)
        samples = [
            preprocess(item.id, item.text + PROMPT_SUFFIX, questions.load_images(item))
            for item in questions.items
        ]
        reference = load_reference_model(
            context, TARGET, FORMATS[name], torch.float32, context.parallel.device
        )
        expected = reference_logits(reference, samples)
    for sample, logits in zip(samples, expected, strict=True):
        with torch.no_grad():
            views = sample.images.pixel_values.float()
            found = model(input_ids=sample.input_ids[None], pixel_values=views).logits[0]
        assert (found - logits).abs().mean() < TOLERANCE.get(name, 5e-3) * logits.std()


@pytest.fixture
def copy_export(workdir, tmp_path):
    """Function that copies an export and returns what verifies the copy, and the copy."""

    def copy(name, kv_cache="none"):
        source = workdir if kv_cache == "none" else workdir / "cached"
        shutil.copytree(source / name, tmp_path / name)

        def failed_checks():
            with models.single_rank() as parallel, pytest.raises(VerificationError):
                verify(make_context(parallel, tmp_path, (name,), kv_cache))
            checks = store.read_json(tmp_path / name / "verify.json")["checks"]
            return {check["name"] for check in checks if not check["passed"]}

        return failed_checks, Export(tmp_path / name / TARGET, TARGET)

    return copy


def flip(key):
    def change(tensors):
        tensors[key].view(torch.uint8).view(-1)[777] ^= 0x40

    return change


def double(key):
    def change(tensors):
        tensors[key] = tensors[key] * 2

    return change


def remove(key):
    def change(tensors):
        del tensors[key]

    return change


def restore_norm(tensors):
    """Restore a folded norm to that of the source."""
    name = f"{LAYER}input_layernorm.weight"
    tensors[name] = load_file(models.TINY_LLAVA / models.WEIGHTS)[name]


@pytest.mark.parametrize(
    ("name", "kv_cache", "change", "check"),
    [
        ("fp8", "none", flip(f"{LAYER}mlp.down_proj.weight"), "weights"),
        ("int4_awq", "none", flip(f"{LAYER}mlp.down_proj.weight_packed"), "weights"),
        ("int8_sq", "none", double(f"{LAYER}mlp.up_proj.weight_scale"), "weights"),
        ("int8_sq", "none", double(f"{LAYER}self_attn.v_proj.input_scale"), "input scales"),
        ("int8_sq", "none", restore_norm, "untouched"),
        ("int4_awq", "none", restore_norm, "untouched"),
        ("w4a8_awq", "none", remove(f"{LAYER}mlp.up_proj.weight_shape"), "configs"),
        ("int8_sq", "fp8", double(f"{LAYER}self_attn.v_scale"), "KV scales"),
    ],
)
def test_damage_is_detected(copy_export, name, kv_cache, change, check):
    failed_checks, export = copy_export(name, kv_cache)
    export.change(change)
    export.sign()
    assert f"{TARGET} {check}" in failed_checks()


@pytest.mark.parametrize(
    ("name", "kv_cache", "key"),
    [
        ("w4a8_awq", "none", "mlp.up_proj.weight_shape"),
        ("int8_sq", "none", "mlp.up_proj.input_scale"),
        ("fp8", "fp8", "self_attn.v_scale"),
    ],
)
def test_reader_rejects_a_missing_tensor(copy_export, name, kv_cache, key):
    _, export = copy_export(name, kv_cache)
    export.change(remove(LAYER + key))
    with pytest.raises(VerificationError, match=f"{key} is missing"):
        read_compressed_tensors(export.folder, llava.FAMILY)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(ignore=[]),
        lambda config: config["ignore"].append("re:.*self_attn.*"),
        lambda config: config.update(format="float-quantized"),
        lambda config: config["config_groups"]["group_0"]["weights"].update(group_size=64),
        lambda config: config.update(kv_cache_scheme={"num_bits": 8, "type": "float"}),
    ],
)
def test_quantization_config_of_another_checkpoint_is_detected(copy_export, change):
    failed_checks, export = copy_export("int4_awq")
    export.configure(lambda config: change(config["quantization_config"]), "config.json")
    export.sign()
    assert f"{TARGET} configs" in failed_checks()


def test_ignore_patterns_of_phi():
    quantized = ["model.layers.0.self_attn.qkv_proj.weight"]
    unquantized = {
        "model.vision_embed_tokens.img_processor.vision_model.encoder.layers.0.fc1.weight": (8, 4),
        "model.norm.weight": (4,),
        "lm_head.weight": (8, 4),
    }
    expected = ["re:.*lm_head.*", "re:.*vision_embed_tokens.*"]
    assert ignore_patterns(unquantized, quantized) == expected
