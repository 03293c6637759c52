"""The stage build, and engines that are asked, with a place-holder for TensorRT-LLM."""

import json

import pytest
import torch
from bad_models import PREFIX, running, write_recipe
from engines import install, plan_for, run, write_checkpoint
from safetensors.torch import load_file, save_file

from nemo_vlm_ptq.data.questions import load_questions
from nemo_vlm_ptq.errors import UserError, VerificationError
from nemo_vlm_ptq.families.shared import load_tokenizer
from nemo_vlm_ptq.stages.build import build
from nemo_vlm_ptq.stages.evaluate import evaluate
from nemo_vlm_ptq.stages.logits import write_logits
from nemo_vlm_ptq.workdir import store

TOWER = {"llava": [64, 256], "vila": [25, 256]}  # image tokens, hidden


@pytest.fixture
def trtllm(tmp_path, monkeypatch):
    return install(tmp_path / "trt", monkeypatch)


@pytest.mark.parametrize(
    ("family", "fmt", "tensor", "pipeline"),
    [
        ("llava", "fp8", 2, 2),
        ("vila", "int4_awq", 1, 2),
        ("phi", "int8_sq", 2, 1),
        ("phi", "nvfp4", 1, 1),
    ],
)
def test_engines_are_built_and_told_in_the_manifest(
    tmp_path, monkeypatch, trtllm, family, fmt, tensor, pipeline
):
    for name in ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        monkeypatch.setenv(name, "0" if name != "WORLD_SIZE" else "1")
    plan = plan_for(family, tmp_path, fmt, tensor, pipeline)
    source = write_checkpoint(plan)
    run(build, plan)
    decoder, *vision = trtllm.words()
    assert decoder[1:3] == ["--checkpoint_dir", str(source / "llm")]
    assert len(vision) == (family != "phi")
    for call in trtllm.calls:  # a rank's environment would make MPI wait for the others
        assert not [name for name in call["names"] if name.startswith(("RANK", "OMPI", "SLURM"))]
    folder = tmp_path / fmt / "engine"
    manifest = store.read_manifest(folder)
    ranks = [f"llm/rank{rank}.engine" for rank in range(tensor * pipeline)]
    expected = {*ranks, "llm/config.json", "vision/config.json", "llm.log"}
    expected |= set() if family == "phi" else {"vision/model.engine", "vision.log"}
    assert set(manifest["files"]) == expected and manifest["stage"] == f"build {fmt}"
    settings = manifest["settings"]
    assert (settings["tensorrt_llm"], settings["format"]) == ("1.2.1", fmt)
    assert settings["input"] == store.hash_manifest(source)
    kind = store.read_json(folder / "vision" / "config.json")["builder_config"]["model_type"]
    assert kind == {"llava": "llava", "vila": "vila", "phi": "phi-3-vision"}[family]
    run(build, plan)
    assert len(trtllm.words()) == 1 + len(vision)  # a finished one is left alone
    with pytest.raises(UserError, match="max_batch_size=8, the recipe says 9"):
        run(build, plan_for(family, tmp_path, fmt, tensor, pipeline, engine={"max_batch_size": 9}))


def test_a_failing_command_is_told_with_the_end_of_its_log_and_built_the_next_time(
    tmp_path, monkeypatch, trtllm
):
    plan = plan_for("llava", tmp_path)
    write_checkpoint(plan)
    log = tmp_path / "fp8" / "engine" / "llm.log"
    with monkeypatch.context() as broken:
        broken.setenv("FAKE_FAIL", "1")
        with pytest.raises(UserError) as caught:
            run(build, plan)
    assert str(caught.value) == (
        f"trtllm-build ended with exit code 1; the last it said, in {log}: [TRT-LLM] [I] Compute "
        "capability: (9, 0) | RuntimeError: out of memory | while building rank 1"
    )
    assert log.is_file() and store.read_manifest(log.parent) is None
    with monkeypatch.context() as broken:
        broken.setenv("FAKE_LOSE", "1")
        with pytest.raises(UserError, match=r"^trtllm-build left no .*/llm/rank0.engine; the last"):
            run(build, plan)
    run(build, plan)
    assert store.read_manifest(log.parent) is not None
    assert (tmp_path / "timing.cache").is_file()


def test_without_a_checkpoint_the_stage_before_is_named(tmp_path, trtllm):
    with pytest.raises(UserError, match="is not finished; run the stage 'export' first"):
        run(build, plan_for("llava", tmp_path))
    assert trtllm.words() == []


def built(tmp_path, monkeypatch, family, **keys):
    """The plan of a family whose engines are built."""
    monkeypatch.setenv("FAKE_TOWER", json.dumps(TOWER.get(family)))
    plan = plan_for(family, tmp_path, **keys)
    write_checkpoint(plan)
    run(build, plan)
    return plan


def prompts(plan, family):
    """A question about an image, and the same as inputs of `logits`."""
    questions = load_questions("scenes", "test", 1)
    prepare = plan.family.make_preprocessor(plan.folder, plan.config)
    (item,) = questions.items
    sample = prepare("q", item.text, questions.image(item.image))
    ids = sample.input_ids
    if family == "vila":  # published ids have one mark for an image
        first = int(sample.is_image.int().argmax())
        ids = torch.cat([ids[: first + 1], ids[first + int(sample.is_image.sum()) :]])
    found = {"input_ids": ids[None], "pixel_values": sample.pixels.pixel_values}
    if sample.pixels.image_sizes is not None:
        found["image_sizes"] = sample.pixels.image_sizes
    return sample, found


@pytest.mark.parametrize(("family", "ranks"), [("llava", 2), ("vila", 1), ("phi", 1)])
def test_logits_are_those_of_the_engine_with_its_features_in_place(
    tmp_path, monkeypatch, trtllm, family, ranks
):
    engine = {"context_logits": True}
    plan = built(tmp_path, monkeypatch, family, tensor=ranks, engine=engine)
    sample, inputs = prompts(plan, family)
    save_file(inputs, tmp_path / "in")
    options = {"from": "engine", "inputs": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    run(write_logits, plan, options)
    logits = load_file(tmp_path / "out")["logits"][0]
    assert torch.equal(logits[~sample.is_image, 0], sample.input_ids[~sample.is_image].float())
    assert (logits[sample.is_image, 1] == -1).all() and (logits[~sample.is_image, 1] == 0).all()
    features = logits[sample.is_image, 0]
    if family in TOWER:
        tokens, hidden = TOWER[family]
        assert torch.equal(features, torch.arange(tokens) * float(hidden))
    else:  # as torch's tower sees the image
        tower = plan.family.build_vision(
            plan.config, load_file(tmp_path / "fp8/trtllm/vision/model.safetensors")
        )
        seen = tower(sample.pixels.to("cpu", torch.bfloat16)).float().sum(1)
        assert torch.equal(features, seen)


def test_an_engine_without_logits_and_a_mask_that_hides_are_refused(tmp_path, monkeypatch, trtllm):
    plan = built(tmp_path, monkeypatch, "llava")
    _, inputs = prompts(plan, "llava")
    save_file(inputs, tmp_path / "in")
    options = {"from": "engine", "inputs": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"build it with engine.context_logits=true$"):
        run(write_logits, plan, options)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 0] = 0
    save_file({**inputs, "attention_mask": mask}, tmp_path / "in")
    with pytest.raises(UserError, match=r"^from=engine takes no attention_mask that hides tokens"):
        run(write_logits, plan, options)


def test_an_engine_that_is_not_built_or_does_not_start_is_told(tmp_path, monkeypatch, trtllm):
    plan = plan_for("llava", tmp_path, engine={"context_logits": True})
    ids = {"input_ids": torch.arange(4, 9)[None]}
    save_file(ids, tmp_path / "in")
    options = {"from": "engine", "inputs": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match="is not finished; run the stage 'build' first"):
        run(write_logits, plan, options)
    built(tmp_path, monkeypatch, "llava", engine={"context_logits": True})
    monkeypatch.setenv("FAKE_NO_ENGINE", "1")
    with pytest.raises(UserError) as caught:
        run(write_logits, plan, options)
    folder = tmp_path / "fp8" / "engine"
    said = str(caught.value)
    assert said.startswith(f"the engine in {folder} ended with code 1: ")
    assert said.endswith("| RuntimeError: engine was built for another GPU")


def test_questions_are_answered_by_the_engine_in_its_batches(tmp_path, monkeypatch, trtllm):
    wanted = {"from": "engine", "limit": 5, "batch": 4}
    plan = built(
        tmp_path, monkeypatch, "llava", engine={"max_batch_size": 3}, evaluate=wanted
    )  # the place-holder refuses more at once
    with pytest.raises(
        VerificationError, match="no longer looks"
    ):  # it says the same to every image
        run(evaluate, plan)
    folder = tmp_path / "fp8" / "evaluate"
    settings = store.read_manifest(folder)["settings"]
    assert settings["target"] == "engine"
    assert settings["input"] == store.hash_manifest(tmp_path / "fp8" / "engine")
    answers = store.read_json(folder / "answers.json")
    assert len(answers["own"]) == 5 and len(set(answers["own"].values())) == 1
    expected = load_tokenizer(plan.folder).decode([7, 8], skip_special_tokens=True)
    assert set(answers["own"].values()) == {expected}


def test_a_failure_ends_all_ranks_of_the_command_with_2_and_one_line(tmp_path, monkeypatch, trtllm):
    monkeypatch.setenv("FAKE_FAIL", "1")
    write_checkpoint(plan_for("llava", tmp_path / "work", tensor=2))
    recipe = write_recipe(tmp_path, parallel={"tensor": 1, "data": 2}, export={"tensor": 2})
    with running(tmp_path, "nemo_vlm_ptq", "build", recipe) as command:
        code, lines = command.end()
    assert code == 2 and len(trtllm.words()) == 1, lines
    assert lines[-1].startswith(f"{PREFIX}trtllm-build ended with exit code 1; the last it said")
    assert not [line for line in lines[:-1] if "Traceback" in line or "rror" in line]
