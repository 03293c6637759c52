"""NeMo 2 checkpoints: export, reading back, damage, rejected plans, and restoring by NeMo.

Restoring requires an interpreter with NeMo 2.7.3, set by NEMO_VLM_PTQ_NEMO_PYTHON, because NeMo
pins other versions of this package's dependencies. All other tests run without NeMo.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from conftest import Export
from fake_gpu import check_linears_on_device
from nemo_folders import FC1, FORMAT_NAMES, error_message, make_context
from safetensors.torch import load_file, save_file

from nemo_vlm_ptq.checkpoints import torch_dist_index as torch_dist
from nemo_vlm_ptq.checkpoints import torch_dist_tensors as blocks
from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX, load_questions
from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.sources.nemo2 import read_context
from nemo_vlm_ptq.stages import run_stages
from nemo_vlm_ptq.stages.verify import verify
from nemo_vlm_ptq.targets.nemo2.reader import read_nemo
from nemo_vlm_ptq.verify.model_forms import quantized_logits, source_logits
from nemo_vlm_ptq.workdir import store

NEMO_PYTHON = os.environ.get("NEMO_VLM_PTQ_NEMO_PYTHON")
# Mean distance of NeMo's logits, in standard deviations. The order of summation differs, and with
# quantized inputs some values near a rounding boundary round differently.
TOLERANCE, TOLERANCE_QUANTIZED_INPUTS = 1e-5, 1e-2


def check_names(path):
    return {check["name"] for check in store.read_json(path)["checks"]}


# Export and reading back


def test_formats_that_nemo_does_not_support():
    assert set(FORMATS) - set(FORMAT_NAMES) == {"nvfp4_svdquant", "nf4"}


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_all_formats_are_verified(nemo_line, name):
    found = check_names(nemo_line / name / "verify.json")
    expected = ("configs", "coverage", "quantized set", "untouched", "weights", "logits")
    assert {f"nemo {check}" for check in expected} <= found


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_linears_are_decoded_on_a_gpu(nemo_line, name, monkeypatch):
    decoder = make_plan(Recipe(model=str(models.TINY_LLAVA), workdir="nowhere")).decoder
    read = read_nemo(nemo_line / name / "nemo", decoder, "language_model.")
    check_linears_on_device(read.linears, monkeypatch)


def test_only_16_bit_checkpoints_stack_layers(nemo_line):
    stacked = torch_dist.read_index(nemo_line / "nemo" / "weights").tensors
    assert stacked[FC1.replace(".1.", ".") + ".weight"].shape == (4, 1536, 256)
    separate = torch_dist.read_index(nemo_line / "fp8" / "nemo" / "weights").tensors
    assert separate[FC1 + ".weight_w"].shape == (768, 256)
    assert all(name.startswith("module.") for name in (*stacked, *separate))


@pytest.mark.parametrize("name", ["int8_sq", "w4a8_awq"])
def test_checkpoint_does_not_depend_on_the_layout(nemo_line, tmp_path, name):
    code, _, err = models.launch_ranks(
        [*models.main_command("test_nemo_checkpoint"), nemo_line, tmp_path, name], 2
    )
    assert code == 0, err
    one, two = (
        torch_dist.read_index(home / name / "nemo" / "weights") for home in (nemo_line, tmp_path)
    )
    assert set(one.tensors) == set(two.tensors) and set(one.objects) == set(two.objects)
    for key in one.tensors:
        first, second = (blocks.read_tensor(index.tensors[key]) for index in (one, two))
        assert torch.equal(first, second), key
    for key in one.objects:
        first, second = (torch_dist.read_object(index, key) for index in (one, two))
        assert first == second, key


def main():
    """Export a solved work folder at TP 2; entry point of the ranks."""
    source, home, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    for parallel in models.parallel_contexts([(2, 1, 1)]):
        if parallel.rank == 0:
            shutil.copytree(source / name / "scales", home / name / "scales")
        parallel.barrier()
        run_stages(make_context(parallel, home, (name,)), ("export",))


def test_context_has_a_relative_tokenizer_path(nemo_line):
    model = read_context(nemo_line / "nemo")
    assert model["tokenizer"]["pretrained_model_name"] == "tokenizer"
    assert str(nemo_line) not in (nemo_line / "nemo" / "context" / "io.json").read_text()
    assert (nemo_line / "nemo" / "context" / "tokenizer" / "tokenizer.json").is_file()
    assert (
        "_target_: nemo.collections.vlm"
        in (nemo_line / "nemo" / "context" / "model.yaml").read_text()
    )


# Rejected plans


def test_quantized_kv_cache_is_rejected():
    keys = {"quantize": {"kv_cache": "fp8"}, "export": {"targets": ("trtllm", "nemo")}}
    message = error_message(models.TINY_LLAVA, **keys)
    assert message.startswith("target nemo does not support quantize.kv_cache=fp8; set")
    assert message.endswith("e.g. export.targets=[trtllm]")


def test_other_families_are_rejected():
    message = error_message(models.ROOT / "assets" / "tiny-phi", export={"targets": ("nemo",)})
    assert message.startswith("target nemo supports the family llava, and this model is phi; ")


@pytest.mark.parametrize("name", ["nf4", "nvfp4_svdquant"])
def test_unsupported_format_is_rejected(name):
    keys = {"quantize": {"format": name}, "export": {"targets": ("nemo",)}}
    expected = f"format {name} cannot be exported to nemo; supported: hf, megatron"
    assert error_message(models.TINY_LLAVA, **keys) == expected


# Damage


@pytest.fixture
def copy_export(nemo_line, tmp_path):
    """Function that copies an export and returns the stage verify and the copy."""

    def copy(name):
        shutil.copytree(nemo_line / name, tmp_path / name)

        def run():
            with models.single_rank() as parallel:
                verify(make_context(parallel, tmp_path, (name,)))

        return run, Export(tmp_path / name / "nemo", "nemo")

    return copy


def flip_bit(folder, name):
    """Flip a bit in the middle of a stored tensor."""
    byte_range = torch_dist.read_index(folder / "weights").tensors[name].chunks[0].byte_range
    raw = bytearray(byte_range.file.read_bytes())
    raw[byte_range.offset + byte_range.length // 2] ^= 0x40
    byte_range.file.write_bytes(raw)


@pytest.mark.parametrize(
    ("stored", "check"),
    [(f"{FC1}.weight_v", "weights"), ("module.vision_projection.0.weight", "untouched")],
)
def test_flipped_bit_is_detected(copy_export, stored, check):
    run, export = copy_export("fp8")
    flip_bit(export.folder, stored)
    export.sign()
    with pytest.raises(VerificationError, match=f"nemo ({check}|readable)"):
        run()


@pytest.mark.parametrize("key", ["num_layers", "rotary_base", "kv_channels", "patch_size"])
def test_context_of_another_model_is_detected(copy_export, key):
    run, export = copy_export("fp8")
    path = export.folder / "context" / "io.json"
    content = json.loads(path.read_text())
    for entry in content["objects"].values():
        for item in entry["items"]:
            if item[0] == f"Attr(name={key!r})":
                item[1]["value"] += 1
    path.write_text(json.dumps(content))
    export.sign()
    with pytest.raises(VerificationError, match=f"nemo configs: context/io.json: .*{key}"):
        run()


def test_reader_rejects_a_missing_tensor(nemo_line):
    decoder = make_plan(Recipe(model=str(models.TINY_LLAVA), workdir="nowhere")).decoder
    with pytest.raises(VerificationError, match="is missing"):
        read_nemo(nemo_line / "nemo", decoder, "language_model.")  # its layers are stacked


# Restoring by NeMo


@pytest.fixture(scope="module")
def nemo_logits(nemo_line, tmp_path_factory):
    """Folder with the logits of each model that NeMo restored, and the samples."""
    if NEMO_PYTHON is None:
        pytest.skip(
            "NEMO_VLM_PTQ_NEMO_PYTHON names no Python with NeMo 2.7.3 (docs/legacy/nemo2.md)"
        )
    home = tmp_path_factory.mktemp("nemo")
    plan = make_plan(Recipe(model=str(models.TINY_LLAVA), workdir="nowhere"))
    questions = load_questions("scenes", "test", 2)
    preprocess = plan.family.make_preprocessor(plan.folder, plan.config)
    samples = [
        preprocess(item.id, item.text + PROMPT_SUFFIX, questions.load_images(item))
        for item in questions.items
    ]
    length = min(len(one.input_ids) for one in samples)
    inputs = {
        "input_ids": torch.stack([one.input_ids[:length] for one in samples]),
        "pixel_values": torch.cat([one.images.pixel_values for one in samples]),
        "image_id": torch.tensor(plan.config["image_token_index"]),
        "image_tokens": torch.tensor(plan.family.tokens_per_image(plan.config)),
    }
    save_file(inputs, home / "inputs.safetensors")
    (home / "elsewhere" / "16bit").mkdir(parents=True)
    shutil.copytree(nemo_line / "nemo", home / "elsewhere" / "16bit" / "nemo")
    folders = [
        home / "elsewhere" / "16bit" / "nemo",
        *(nemo_line / name / "nemo" for name in FORMAT_NAMES),
    ]
    command = [
        NEMO_PYTHON,
        models.ROOT / "tests" / "nemo_restore.py",
        home / "inputs.safetensors",
        home,
    ]
    environment = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [*map(str, command), *map(str, folders)],
        env=os.environ | environment, cwd=home, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    truncated = [
        type(one)(one.id, one.input_ids[:length], one.is_image[:length], one.images)
        for one in samples
    ]
    return home, truncated


def distance(actual, expected):
    """Return the mean distance of logits in standard deviations."""
    expected = torch.stack(expected)
    difference = actual[..., : expected.shape[-1]] - expected
    return float(difference.abs().mean() / expected.std())


def test_nemo_restores_the_16_bit_model(nemo_line, nemo_logits):
    home, samples = nemo_logits
    with models.single_rank() as parallel:
        expected = source_logits(make_context(parallel, nemo_line), samples)
    assert distance(load_file(home / "16bit.safetensors")["rounded"], expected) < TOLERANCE


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_nemo_restores_all_formats(nemo_line, nemo_logits, name):
    home, samples = nemo_logits
    found = load_file(home / f"{name}.safetensors")
    with models.single_rank() as parallel:
        context = make_context(parallel, nemo_line, (name,))
        rounded, exact = quantized_logits(context, FORMATS[name], samples)
    error, quantized_error = distance(found["exact"], exact), distance(found["rounded"], rounded)
    print(f"{name}: {error:.1e}, with quantized inputs {quantized_error:.1e}")
    assert error < TOLERANCE and quantized_error < TOLERANCE_QUANTIZED_INPUTS
