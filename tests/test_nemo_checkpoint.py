"""NeMo checkpoints: written, read back, damaged, refused; restored by NeMo.

The last needs a Python with NeMo 2.7.3, which NEMO_VLM_PTQ_NEMO_PYTHON names: its pins clash with
ours. Everything else runs without.
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
from nemo_folders import FC1, NAMES, job, refusal
from pretended_gpu import check_linears_on_it
from safetensors.torch import load_file, save_file

from nemo_vlm_ptq.checkpoints import torch_dist_index as torch_dist
from nemo_vlm_ptq.checkpoints import torch_dist_tensors as blocks
from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX, load_questions
from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.planning.plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.stages import run_stages
from nemo_vlm_ptq.stages.model_forms import logits_with_and_without_rounding, megatron_logits
from nemo_vlm_ptq.stages.verify import verify
from nemo_vlm_ptq.targets.nemo2.reader import read_nemo
from nemo_vlm_ptq.targets.nemo2.source import read_context
from nemo_vlm_ptq.workdir import store

NEMO = os.environ.get("NEMO_VLM_PTQ_NEMO_PYTHON")
# How far NeMo's logits may be off ours, in spreads of logits: the order of sums is another, and
# with inputs rounded, values near a boundary go the other way.
EXACT, ROUNDED = 1e-5, 1e-2


def checks_of(folder):
    return {one["name"]: one["detail"] for one in store.read_json(folder)["checks"]}


# Written and read back


def test_nine_formats_have_a_form_in_nemo():
    assert set(FORMATS) - set(NAMES) == {"nvfp4_svdquant", "nf4"}


@pytest.mark.parametrize("name", NAMES)
def test_every_format_is_verified(nemo_line, name):
    found = checks_of(nemo_line / name / "verify.json")
    wanted = ("configs", "coverage", "quantized set", "untouched", "weights", "logits")
    assert {f"nemo {what}" for what in wanted} <= set(found)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_is_worked_with_on_a_gpu(nemo_line, name, monkeypatch):
    decoder = make_plan(Recipe(model=str(models.TINY_LLAVA), workdir="nowhere")).decoder
    read = read_nemo(nemo_line / name / "nemo", decoder, "language_model.")
    check_linears_on_it(read.linears, monkeypatch)


def test_a_16_bit_model_has_its_layers_stacked_and_a_quantized_one_apart(nemo_line):
    whole = torch_dist.read_index(nemo_line / "nemo" / "weights").tensors
    assert whole[FC1.replace(".1.", ".") + ".weight"].shape == (4, 1536, 256)
    apart = torch_dist.read_index(nemo_line / "fp8" / "nemo" / "weights").tensors
    assert apart[FC1 + ".weight_w"].shape == (768, 256)
    assert all(name.startswith("module.") for name in (*whole, *apart))


@pytest.mark.parametrize("name", ["int8_sq", "w4a8_awq"])
def test_two_tensor_ranks_write_what_one_writes(nemo_line, tmp_path, name):
    code, _, err = models.launch(
        [*models.main_of("test_nemo_checkpoint"), nemo_line, tmp_path, name], 2
    )
    assert code == 0, err
    one, two = (
        torch_dist.read_index(home / name / "nemo" / "weights") for home in (nemo_line, tmp_path)
    )
    assert set(one.tensors) == set(two.tensors) and set(one.objects) == set(two.objects)
    for key in one.tensors:
        mine, theirs = (blocks.read_tensor(index.tensors[key]) for index in (one, two))
        assert torch.equal(mine, theirs), key
    for key in one.objects:
        mine, theirs = (torch_dist.read_object(index, key) for index in (one, two))
        assert mine == theirs, key


def main():
    """Ranks: a solved work folder quantized and exported at TP 2."""
    source, home, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    for own in models.each_layout([(2, 1, 1)]):
        if own.rank == 0:
            for part in ("megatron", "statistics", f"{name}/scales"):
                shutil.copytree(source / part, home / part)
        own.barrier()
        run_stages(job(own, home, (name,)), ("import", "observe", "solve", "export"))


def test_context_is_where_the_tokenizer_is_wherever_the_folder_goes(nemo_line):
    model = read_context(nemo_line / "nemo")
    assert model["tokenizer"]["pretrained_model_name"] == "tokenizer"
    assert str(nemo_line) not in (nemo_line / "nemo" / "context" / "io.json").read_text()
    assert (nemo_line / "nemo" / "context" / "tokenizer" / "tokenizer.json").is_file()
    assert (
        "_target_: nemo.collections.vlm"
        in (nemo_line / "nemo" / "context" / "model.yaml").read_text()
    )


# Refused by the plan


def test_a_kv_cache_has_no_place_in_nemo():
    said = refusal(models.TINY_LLAVA, quantize={"kv_cache": "fp8"},
                   export={"targets": ("trtllm", "nemo")})  # fmt: skip
    assert said.startswith("NeMo's form has no place for quantize.kv_cache=fp8; set")
    assert said.endswith("e.g. export.targets=[trtllm]")


def test_other_families_have_no_form_in_nemo():
    said = refusal(models.ROOT / "assets" / "tiny-phi", export={"targets": ("nemo",)})
    assert said.startswith("NeMo's form is written for the family llava, not phi; leave nemo out")


@pytest.mark.parametrize("name", ["nf4", "nvfp4_svdquant"])
def test_a_format_without_a_form_is_refused_with_what_takes_it(name):
    said = refusal(models.TINY_LLAVA, quantize={"format": name}, export={"targets": ("nemo",)})
    assert said == f"format {name} cannot be exported to nemo; it can to: hf"


# Damage


@pytest.fixture
def proving(nemo_line, tmp_path):
    """name -> (the stage verify, a copy of the export to be damaged)."""

    def copy(name):
        for part in ("megatron", name):
            shutil.copytree(nemo_line / part, tmp_path / part)

        def run():
            with models.alone() as own:
                verify(job(own, tmp_path, (name,)))

        return run, Export(tmp_path / name / "nemo", "nemo")

    return copy


def flip(folder, name):
    """One byte in the middle of a stored tensor."""
    place = torch_dist.read_index(folder / "weights").tensors[name].chunks[0].place
    raw = bytearray(place.file.read_bytes())
    raw[place.offset + place.length // 2] ^= 0x40
    place.file.write_bytes(raw)


@pytest.mark.parametrize(
    ("stored", "said"),
    [(f"{FC1}.weight_v", "weights"), ("module.vision_projection.0.weight", "untouched")],
)
def test_a_changed_byte_is_found(proving, stored, said):
    run, export = proving("fp8")
    flip(export.folder, stored)
    export.sign()
    with pytest.raises(VerificationError, match=f"nemo ({said}|readable)"):
        run()


@pytest.mark.parametrize("key", ["num_layers", "rotary_base", "kv_channels", "patch_size"])
def test_a_context_of_another_model_is_found(proving, key):
    run, export = proving("fp8")
    path = export.folder / "context" / "io.json"
    facts = json.loads(path.read_text())
    for entry in facts["objects"].values():
        for item in entry["items"]:
            if item[0] == f"Attr(name={key!r})":
                item[1]["value"] += 1
    path.write_text(json.dumps(facts))
    export.sign()
    with pytest.raises(VerificationError, match=f"nemo configs: context/io.json: .*{key}"):
        run()


def test_a_missing_tensor_stops_the_reader(nemo_line):
    decoder = make_plan(Recipe(model=str(models.TINY_LLAVA), workdir="nowhere")).decoder
    with pytest.raises(VerificationError, match="is missing"):
        read_nemo(nemo_line / "nemo", decoder, "language_model.")  # has no layers apart


# NeMo itself


@pytest.fixture(scope="module")
def asked(nemo_line, tmp_path_factory):
    """name -> what NeMo says with the folder it restored; inputs and samples beside."""
    if NEMO is None:
        pytest.skip("NEMO_VLM_PTQ_NEMO_PYTHON names no Python with NeMo 2.7.3 (docs/nemo.md)")
    home = tmp_path_factory.mktemp("nemo")
    plan = make_plan(Recipe(model=str(models.TINY_LLAVA), workdir="nowhere"))
    questions = load_questions("scenes", "test", 2)
    prepare = plan.family.make_preprocessor(plan.folder, plan.config)
    samples = [
        prepare(item.id, item.text + PROMPT_SUFFIX, questions.image(item.image))
        for item in questions.items
    ]
    length = min(len(one.input_ids) for one in samples)
    inputs = {
        "input_ids": torch.stack([one.input_ids[:length] for one in samples]),
        "pixel_values": torch.cat([one.pixels.pixel_values for one in samples]),
        "image_id": torch.tensor(plan.config["image_token_index"]),
        "image_tokens": torch.tensor(plan.family.tokens_per_image(plan.config)),
    }
    save_file(inputs, home / "inputs.safetensors")
    (home / "elsewhere" / "16bit").mkdir(parents=True)
    shutil.copytree(nemo_line / "nemo", home / "elsewhere" / "16bit" / "nemo")
    folders = [
        home / "elsewhere" / "16bit" / "nemo",
        *(nemo_line / name / "nemo" for name in NAMES),
    ]
    words = [NEMO, models.ROOT / "tests" / "nemo_restore.py", home / "inputs.safetensors", home]
    settings = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*map(str, words), *map(str, folders)],
        env=os.environ | settings, cwd=home, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    short = [
        type(one)(one.id, one.input_ids[:length], one.is_image[:length], one.pixels)
        for one in samples
    ]
    return home, short


def apart(found, expected):
    """Mean distance in spreads."""
    wanted = torch.stack(expected)
    return float((found[..., : wanted.shape[-1]] - wanted).abs().mean() / wanted.std())


def test_nemo_restores_the_16_bit_model(nemo_line, asked):
    home, samples = asked
    with models.alone() as own:
        expected = megatron_logits(job(own, nemo_line), None, samples)
    assert apart(load_file(home / "16bit.safetensors")["rounded"], expected) < EXACT


@pytest.mark.parametrize("name", NAMES)
def test_nemo_restores_every_format(nemo_line, asked, name):
    home, samples = asked
    found = load_file(home / f"{name}.safetensors")
    with models.alone() as own:
        mine = job(own, nemo_line, (name,))
        rounded, exact = logits_with_and_without_rounding(mine, FORMATS[name], samples)
    distances = apart(found["exact"], exact), apart(found["rounded"], rounded)
    print(f"{name}: {distances[0]:.1e}, with inputs rounded {distances[1]:.1e}")
    assert distances[0] < EXACT and distances[1] < ROUNDED
