"""What was quantized once is exported and loaded in other layouts, without calibrating again."""

import math
import shutil
import sys
from pathlib import Path

import models
import pytest
import torch
from modelopt.torch.opt.plugins.mcore_dist_checkpointing import restore_sharded_modelopt_state

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX, load_questions
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.planning.plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.stages.export import export
from nemo_vlm_ptq.stages.model_forms import logits_with_and_without_rounding
from nemo_vlm_ptq.targets.megatron.quantized_checkpoint import load_quantized
from nemo_vlm_ptq.targets.trtllm.contract import check_contract
from nemo_vlm_ptq.targets.trtllm.reader import read_trtllm
from nemo_vlm_ptq.verify.tensors import compare_logits
from nemo_vlm_ptq.workdir.store import read_manifest

ONE, TENSOR, PIPELINE = "1x1x1", "2x1x1", "1x2x1"
EXPORTED = [name for name, row in FORMATS.items() if "trtllm" in row.targets]
CUTS = {name: (1, 2) if row.weight == "int4" else (4, 2) for name, row in FORMATS.items()}
LAYOUTS = {TENSOR: (2, 1, 1), PIPELINE: (1, 2, 1)}
# modelopt knows nothing of nf4's absmaxes, nor of our branch beside the weights.
BY_MODELOPT = [name for name, row in FORMATS.items() if row.weight != "nf4" and not row.low_rank]
# Mean distance of logits, in units of their standard deviation, float32: without and with rounding
# of activations.
EXACT, TOLERANCE = 1e-5, 1e-3


def job(own, work, formats, targets, cut=(1, 1)):
    recipe = Recipe(
        model=str(models.TINY_LLAVA),
        workdir=str(work),
        parallel=vars(own.layout),
        quantize={"format": formats},
        export={"targets": targets, "tensor": cut[0], "pipeline": cut[1]},
    )
    return RunContext(make_plan(recipe), own)


@pytest.mark.parametrize("name", EXPORTED)
def test_another_cut_is_the_same_bytes_as_if_it_were_the_first(works, tmp_path, name):
    again, first = tmp_path / "again", tmp_path / "first"
    for work, left_out in ((again, ["hf"]), (first, ["hf", "trtllm"])):
        shutil.copytree(works[ONE] / "megatron", work / "megatron")
        ignore = shutil.ignore_patterns(*left_out)
        shutil.copytree(works[ONE] / name, work / name, ignore=ignore)
    with models.alone() as own:
        with pytest.raises(UserError, match="was made with pipeline=1, the recipe says 2"):
            export(job(own, again, name, ("trtllm",), CUTS[name]))
        (again / name / "trtllm").rename(again / name / "trtllm_before")
        export(job(own, again, name, ("trtllm",), CUTS[name]))
        export(job(own, first, name, ("trtllm",), CUTS[name]))
    found, expected = (read_manifest(work / name / "trtllm") for work in (again, first))
    assert found["files"] == expected["files"] and found["settings"] == expected["settings"]
    assert len([file for file in found["files"] if "llm/rank" in file]) == math.prod(CUTS[name])
    assert check_contract(again / name / "trtllm" / "llm") == []
    reads = [read_trtllm(again / name / part / "llm", "") for part in ("trtllm", "trtllm_before")]
    same_model(*reads)


@pytest.mark.parametrize("name", FORMATS)
def test_exported_again_is_the_same_bytes_and_every_file_is_listed(works, tmp_path, name):
    targets = FORMATS[name].targets
    shutil.copytree(works[ONE] / "megatron", tmp_path / "megatron")
    ignore = shutil.ignore_patterns(*FORMATS[name].targets)
    shutil.copytree(works[ONE] / name, tmp_path / name, ignore=ignore)
    listed = []
    with models.alone() as own:
        for _ in range(2):
            export(job(own, tmp_path, name, targets))
            listed.append([read_manifest(tmp_path / name / target)["files"] for target in targets])
            for target in targets:
                home = tmp_path / name / target
                files = {str(one.relative_to(home)) for one in home.rglob("*") if one.is_file()}
                assert files - {"manifest.json"} == set(listed[-1][targets.index(target)])
                shutil.rmtree(home)
    assert listed[0] == listed[1]


def same_model(mine, theirs):
    """Dequantized weights, scales, and tensors in 16 bit are equal bit for bit."""
    assert set(mine.linears) == set(theirs.linears) and set(mine.plain) == set(theirs.plain)
    assert all(torch.equal(mine.plain[key], one) for key, one in theirs.plain.items())
    for key, one in theirs.linears.items():
        own = mine.linears[key]
        assert torch.equal(own.values().weight, one.values().weight), key
        for part in ("pre_quant_scale", "input_scale"):
            pair = getattr(own, part), getattr(one, part)
            assert pair == (None, None) or torch.equal(*pair), (key, part)


def ask(own, work):
    """Format -> logits of three questions, as they are served and activations not rounded."""
    found = {}
    whole = job(own, work, tuple(FORMATS), ("trtllm", "hf"))
    plan = whole.plan
    questions = load_questions("scenes", "test", 3)
    prepare = plan.family.make_preprocessor(plan.folder, plan.config)
    samples = [
        prepare(one.id, one.text + PROMPT_SUFFIX, questions.image(one.image))
        for one in questions.items
    ]
    for fmt in plan.formats:
        found[fmt.name] = logits_with_and_without_rounding(whole, fmt, samples)
    return found


def restored_otherwise(own, work, fmt):
    """Names of parameters and buffers that modelopt, by itself, does not restore as we do."""
    whole = job(own, work, fmt.name, fmt.targets)
    folder = whole.folder(fmt.name, "quantized")
    model = build_decoder(whole.plan.decoder, own, whole.dtype)
    for parameter in model.parameters():
        parameter.data.zero_()  # it makes maxima of whatever is there before it loads
    restore_sharded_modelopt_state([model], folder)
    models.load_with_megatron(model, folder)
    found, expected = model.state_dict(), load_quantized(whole, fmt).state_dict()
    tensors = {key: one for key, one in expected.items() if isinstance(one, torch.Tensor)}
    return [
        key
        for key, one in tensors.items()
        if not key.endswith("_extra_state") and not torch.equal(found[key].float(), one.float())
    ]


def main():
    """Ranks: WORK OUT"""
    work, out = map(Path, sys.argv[1:3])
    for name, own in zip(LAYOUTS, models.each_layout(LAYOUTS.values()), strict=True):
        said = ask(own, work)
        other = {one: restored_otherwise(own, work, FORMATS[one]) for one in BY_MODELOPT}
        if own.rank == 0:
            torch.save((said, other), out / name)


@pytest.fixture(scope="module")
def asked(works, tmp_path_factory):
    """Layout -> (what `ask` found, `restored_otherwise`) of the models that one rank quantized."""
    out = tmp_path_factory.mktemp("asked")
    with models.alone() as own:
        torch.save((ask(own, works[ONE]), {}), out / ONE)
    words = [*models.main_of("test_other_layouts"), works[ONE], out]
    code, _, err = models.launch(words, 2)
    assert code == 0, err[-3000:]
    return {name: torch.load(out / name) for name in (ONE, *LAYOUTS)}


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_checkpoint_says_the_same_on_other_pipeline_ranks(asked, name):
    for found, expected in zip(asked[PIPELINE][0][name], asked[ONE][0][name], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_checkpoint_says_the_same_on_other_tensor_ranks(asked, name):
    """Activations that lie on a tie may round the other way; how many do is the CPU's affair."""
    (rounded, exact), (rounded_one, exact_one) = asked[TENSOR][0][name], asked[ONE][0][name]
    for mine, theirs in zip(exact, exact_one, strict=True):
        distance = compare_logits(mine, theirs)
        assert distance["mean"] < EXACT and distance["argmax_equal"] > 0.99
    for mine, theirs, before in zip(rounded, rounded_one, exact_one, strict=True):
        distance, rounding = compare_logits(mine, theirs), compare_logits(theirs, before)
        assert distance["mean"] < max(TOLERANCE, 0.75 * rounding["mean"])
        assert distance["argmax_equal"] > 0.97


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BY_MODELOPT)
def test_modelopt_by_itself_mixes_up_gate_and_up_on_other_tensor_ranks(asked, layout, name):
    """It cuts their maxima as one tensor; where a row or a group has its own, they are wrong."""
    wrong = asked[layout][1][name]
    if layout == PIPELINE or FORMATS[name].granularity == "tensor":
        assert wrong == []
    else:
        assert len(wrong) == 4
        assert all("linear_fc1.weight_quantizer." in key and "_amax" in key for key in wrong)
