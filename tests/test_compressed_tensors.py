"""compressed-tensors exports: verified, read by transformers through the library, damaged.

The whole line runs on the little trained model, whose two query heads share a KV head.
"""

import shutil

import models
import pytest
import torch
from conftest import Export
from pretended_gpu import check_linears_on_it
from safetensors.torch import load_file

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX, load_questions
from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.families import llava
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.planning.plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.stages import run_stages
from nemo_vlm_ptq.stages.model_forms import load_reference_model, reference_logits
from nemo_vlm_ptq.stages.verify import _folds, verify
from nemo_vlm_ptq.targets.compressed_tensors.reader import read_compressed_tensors
from nemo_vlm_ptq.targets.compressed_tensors.tensors import ignore_patterns
from nemo_vlm_ptq.targets.compressed_tensors.unfolding import unfold
from nemo_vlm_ptq.workdir import store

TARGET = "compressed_tensors"
NAMES = [name for name, row in FORMATS.items() if TARGET in row.targets]
LAYER = "language_model.model.layers.1."
# How far transformers may be off, in spreads of logits: it multiplies packed weights in bfloat16,
# and knows neither the second rounding of W4A8 nor how blocks of inputs are rounded in nvfp4.
APART = {"fp8": 1e-5, "fp8_pc_pt": 1e-5, "int8_sq": 1e-5, "w4a8_awq": 0.05, "nvfp4": 0.1}


def job(own, workdir, names, kv_cache="none"):
    recipe = Recipe(
        model=str(models.TINY_LLAVA),
        workdir=str(workdir),
        quantize={"format": names, "kv_cache": kv_cache},
        calibration={"data": "scenes", "samples": 24, "micro_batch": 8},
        export={"targets": (TARGET,)},
    )
    return RunContext(make_plan(recipe), own)


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Work folders: every format, and three with an fp8 KV cache in `cached`."""
    home = tmp_path_factory.mktemp("line")
    with models.alone() as own:
        stages = (*models.STAGES, "verify")
        run_stages(job(own, home, tuple(NAMES)), stages)
        run_stages(job(own, home / "cached", ("fp8", "int8_sq", "int4_awq"), "fp8"), stages)
    return home


def checks_of(folder):
    return {one["name"]: one["detail"] for one in store.read_json(folder)["checks"]}


@pytest.mark.parametrize("name", NAMES)
def test_every_format_is_verified(line, name):
    found = checks_of(line / name / "verify.json")
    assert {f"{TARGET} {what}" for what in ("configs", "coverage", "untouched", "logits")} <= set(
        found
    )
    static = FORMATS[name].activation in ("fp8", "int8", "nvfp4") and name != "w4a8_awq"
    assert (f"{TARGET} input scales" in found) == static
    scaled = 8 if FORMATS[name].pre_quant_scale else 0  # two norms a layer
    assert found[f"{TARGET} untouched"].endswith(f"{scaled} norms scaled")


@pytest.mark.parametrize("name", ["fp8", "int8_sq", "int4_awq"])
def test_a_rounded_kv_cache_is_verified(line, name):
    assert f"{TARGET} KV scales" in checks_of(line / "cached" / name / "verify.json")
    names = set(load_file(next((line / "cached" / name / TARGET).glob("*.safetensors"))))
    assert {f"{LAYER}self_attn.{part}_scale" for part in "kv"} <= names


@pytest.mark.parametrize("name", NAMES)
def test_the_description_is_one_of_the_librarys_own(line, name):
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    config = store.read_json(line / name / TARGET / "config.json")["quantization_config"]
    read = QuantizationConfig.model_validate(config)
    assert read.quantization_status == QuantizationStatus.COMPRESSED
    (scheme,) = read.config_groups.values()
    assert scheme.weights.num_bits == {"fp8": 8, "int8": 8}.get(FORMATS[name].weight, 4)
    assert read.ignore == [
        f"re:.*{part}.*" for part in ("embed_tokens", "lm_head", "multi_modal_projector",
                                      "vision_tower")
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_is_worked_with_on_a_gpu(line, name, monkeypatch):
    read = read_compressed_tensors(line / name / TARGET, llava.FAMILY)
    with models.alone() as own:
        folds = _folds(job(own, line, (name,)), FORMATS[name], TARGET)
    check_linears_on_it(unfold(read.linears, folds), monkeypatch)


@pytest.fixture
def transformers_loader(monkeypatch):
    """transformers 5.13 and 5.14 take every scale for an expert's, and must be told not to."""
    from transformers import CompressedTensorsConfig, LlavaForConditionalGeneration
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    monkeypatch.setattr(CompressedTensorsHfQuantizer, "get_weight_conversions", lambda self: [])

    def load(folder):
        model = LlavaForConditionalGeneration.from_pretrained(
            folder, quantization_config=CompressedTensorsConfig(run_compressed=False)
        )
        return torch.nn.Module.float(model)  # transformers' own float() refuses

    return load


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_the_logits_of_our_runtime(line, transformers_loader, name):
    model = transformers_loader(line / name / TARGET)
    with models.alone() as own:
        mine = job(own, line, (name,))
        plan = mine.plan
        questions = load_questions("scenes", "test", 2)
        prepare = plan.family.make_preprocessor(plan.folder, plan.config)
        samples = [
            prepare(item.id, item.text + PROMPT_SUFFIX, questions.image(item.image))
            for item in questions.items
        ]
        runtime = load_reference_model(
            mine, TARGET, FORMATS[name], torch.float32, mine.parallel.device
        )
        expected = reference_logits(runtime, samples)
    for sample, logits in zip(samples, expected, strict=True):
        with torch.no_grad():
            views = sample.pixels.pixel_values.float()
            found = model(input_ids=sample.input_ids[None], pixel_values=views).logits[0]
        assert (found - logits).abs().mean() < APART.get(name, 5e-3) * logits.std()


@pytest.fixture
def proving(line, tmp_path):
    """(name, cached) -> (the stage verify, a copy of the export to be damaged)."""

    def copy(name, kv_cache="none"):
        home = line if kv_cache == "none" else line / "cached"
        for part in ("megatron", name):
            shutil.copytree(home / part, tmp_path / part)

        def run():
            with models.alone() as own:
                verify(job(own, tmp_path, (name,), kv_cache))

        return run, Export(tmp_path / name / TARGET, TARGET)

    return copy


def flip(key):
    def change(tensors):
        tensors[key].view(torch.uint8).view(-1)[777] ^= 0x40

    return change


def double(key):
    def change(tensors):
        tensors[key] = tensors[key] * 2

    return change


def lose(key):
    def change(tensors):
        del tensors[key]

    return change


def unscale(tensors):
    """The norm as it was in the source."""
    name = f"{LAYER}input_layernorm.weight"
    tensors[name] = load_file(models.TINY_LLAVA / models.WEIGHTS)[name]


@pytest.mark.parametrize(
    ("name", "kv_cache", "change", "said"),
    [
        ("fp8", "none", flip(f"{LAYER}mlp.down_proj.weight"), "weights"),
        ("int4_awq", "none", flip(f"{LAYER}mlp.down_proj.weight_packed"), "weights"),
        ("int8_sq", "none", double(f"{LAYER}mlp.up_proj.weight_scale"), "weights"),
        ("int8_sq", "none", double(f"{LAYER}self_attn.v_proj.input_scale"), "input scales"),
        ("int8_sq", "none", unscale, "untouched"),
        ("int4_awq", "none", unscale, "untouched"),
        ("w4a8_awq", "none", lose(f"{LAYER}mlp.up_proj.weight_shape"), "configs"),
        ("int8_sq", "fp8", double(f"{LAYER}self_attn.v_scale"), "KV scales"),
    ],
)
def test_damage_is_found(proving, name, kv_cache, change, said):
    run, export = proving(name, kv_cache)
    export.change(change)
    export.sign()
    with pytest.raises(VerificationError, match=f"{TARGET} {said}"):
        run()


@pytest.mark.parametrize(
    ("name", "kv_cache", "key"),
    [
        ("w4a8_awq", "none", "mlp.up_proj.weight_shape"),
        ("int8_sq", "none", "mlp.up_proj.input_scale"),
        ("fp8", "fp8", "self_attn.v_scale"),
    ],
)
def test_a_missing_tensor_stops_the_reader(proving, name, kv_cache, key):
    _, export = proving(name, kv_cache)
    export.change(lose(LAYER + key))
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
def test_a_description_of_another_checkpoint_is_found(proving, change):
    run, export = proving("int4_awq")
    export.configure(lambda config: change(config["quantization_config"]), "config.json")
    export.sign()
    with pytest.raises(VerificationError, match=f"{TARGET} configs"):
        run()


def test_phi_names_what_stays_by_what_sets_it_apart():
    quantized = ["model.layers.0.self_attn.qkv_proj.weight"]
    beside = {
        "model.vision_embed_tokens.img_processor.vision_model.encoder.layers.0.fc1.weight": (8, 4),
        "model.norm.weight": (4,),
        "lm_head.weight": (8, 4),
    }
    expected = ["re:.*lm_head.*", "re:.*vision_embed_tokens.*"]
    assert ignore_patterns(beside, quantized) == expected
