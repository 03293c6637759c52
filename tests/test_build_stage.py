"""The stage build and the use of engines, with a fake TensorRT-LLM."""

import json

import pytest
import torch
from bad_models import PREFIX, running, write_recipe
from engines import install, plan_for, run, write_checkpoint
from safetensors.torch import load_file, save_file

from nemo_vlm_ptq.data.questions import load_questions
from nemo_vlm_ptq.errors import UserError, VerificationError
from nemo_vlm_ptq.families.folder_files import load_tokenizer
from nemo_vlm_ptq.stages.build import build
from nemo_vlm_ptq.stages.evaluate import evaluate
from nemo_vlm_ptq.stages.logits import write_logits
from nemo_vlm_ptq.workdir import store

FEATURE_SIZES = {"llava": [64, 256], "vila": [25, 256]}  # image tokens, hidden size


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
def test_engines_are_built_and_recorded_in_the_manifest(
    tmp_path, monkeypatch, trtllm, family, fmt, tensor, pipeline
):
    for name in ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        monkeypatch.setenv(name, "0" if name != "WORLD_SIZE" else "1")
    plan = plan_for(family, tmp_path, fmt, tensor, pipeline)
    source = write_checkpoint(plan)
    run(build, plan)
    decoder, *vision = trtllm.command_lines()
    assert decoder[1:3] == ["--checkpoint_dir", str(source / "llm")]
    assert len(vision) == (family != "phi")
    launchers = ("RANK", "OMPI", "SLURM")  # with their variables MPI would wait for other ranks
    for call in trtllm.calls:
        assert not [name for name in call["environment"] if name.startswith(launchers)]
    folder = tmp_path / fmt / "engine"
    manifest = store.read_manifest(folder)
    ranks = [f"llm/rank{rank}.engine" for rank in range(tensor * pipeline)]
    expected = {*ranks, "llm/config.json", "vision/config.json", "llm.log"}
    expected |= set() if family == "phi" else {"vision/model.engine", "vision.log"}
    assert set(manifest["files"]) == expected and manifest["stage"] == f"build {fmt}"
    settings = manifest["settings"]
    assert (settings["tensorrt_llm"], settings["format"]) == ("1.2.1", fmt)
    assert settings["input"] == store.hash_manifest(source)
    builder_config = store.read_json(folder / "vision" / "config.json")["builder_config"]
    assert (
        builder_config["model_type"]
        == {"llava": "llava", "vila": "vila", "phi": "phi-3-vision"}[family]
    )
    run(build, plan)
    assert len(trtllm.command_lines()) == 1 + len(vision)  # finished engines are kept
    with pytest.raises(UserError, match="max_batch_size=8, the recipe has 9"):
        run(build, plan_for(family, tmp_path, fmt, tensor, pipeline, engine={"max_batch_size": 9}))


def test_failed_build_is_reported_with_its_log_and_repeated(tmp_path, monkeypatch, trtllm):
    plan = plan_for("llava", tmp_path)
    write_checkpoint(plan)
    log = tmp_path / "fp8" / "engine" / "llm.log"
    with monkeypatch.context() as environment:
        environment.setenv("FAKE_FAIL", "1")
        with pytest.raises(UserError) as caught:
            run(build, plan)
    assert str(caught.value) == (
        f"trtllm-build ended with exit code 1; last output, in {log}: [TRT-LLM] [I] Compute "
        "capability: (9, 0) | RuntimeError: out of memory | while building rank 1"
    )
    assert log.is_file() and store.read_manifest(log.parent) is None
    with monkeypatch.context() as environment:
        environment.setenv("FAKE_OMIT_RANK", "1")
        with pytest.raises(
            UserError, match=r"^trtllm-build did not write .*/llm/rank0.engine; last"
        ):
            run(build, plan)
    run(build, plan)
    assert store.read_manifest(log.parent) is not None
    assert (tmp_path / "timing.cache").is_file()


def test_missing_checkpoint_is_reported(tmp_path, trtllm):
    with pytest.raises(UserError, match="is not finished; run the stage 'export' first"):
        run(build, plan_for("llava", tmp_path))
    assert trtllm.command_lines() == []


def build_engines(tmp_path, monkeypatch, family, **keys):
    """Build the engines of a family and return the plan."""
    monkeypatch.setenv("FAKE_TOWER", json.dumps(FEATURE_SIZES.get(family)))
    plan = plan_for(family, tmp_path, **keys)
    write_checkpoint(plan)
    run(build, plan)
    return plan


def make_prompt(plan, family):
    """Return a sample with an image, and the same as an input file of `logits`."""
    questions = load_questions("scenes", "test", 1)
    preprocess = plan.family.make_preprocessor(plan.folder, plan.config)
    (item,) = questions.items
    sample = preprocess("q", item.text, questions.load_images(item))
    ids = sample.input_ids
    if family == "vila":  # published ids have one placeholder per image
        first = int(sample.is_image.int().argmax())
        ids = torch.cat([ids[: first + 1], ids[first + int(sample.is_image.sum()) :]])
    inputs = {"input_ids": ids[None], "pixel_values": sample.images.pixel_values}
    if sample.images.image_sizes is not None:
        inputs["image_sizes"] = sample.images.image_sizes
    return sample, inputs


@pytest.mark.parametrize(("family", "ranks"), [("llava", 2), ("vila", 1), ("phi", 1)])
def test_logits_of_the_engine_with_image_features(tmp_path, monkeypatch, trtllm, family, ranks):
    engine = {"context_logits": True}
    plan = build_engines(tmp_path, monkeypatch, family, tensor=ranks, engine=engine)
    sample, inputs = make_prompt(plan, family)
    save_file(inputs, tmp_path / "in")
    options = {"from": "engine", "inputs": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    run(write_logits, plan, options)
    logits = load_file(tmp_path / "out")["logits"][0]
    assert torch.equal(logits[~sample.is_image, 0], sample.input_ids[~sample.is_image].float())
    assert (logits[sample.is_image, 1] == -1).all() and (logits[~sample.is_image, 1] == 0).all()
    features = logits[sample.is_image, 0]
    if family in FEATURE_SIZES:
        tokens, hidden = FEATURE_SIZES[family]
        assert torch.equal(features, torch.arange(tokens) * float(hidden))
    else:  # features of the vision module in torch
        vision = plan.family.build_vision(
            plan.config, load_file(tmp_path / "fp8/trtllm/vision/model.safetensors")
        )
        expected = vision(sample.images.to("cpu", torch.bfloat16)).float().sum(1)
        assert torch.equal(features, expected)


def test_missing_context_logits_and_masked_tokens_are_rejected(tmp_path, monkeypatch, trtllm):
    plan = build_engines(tmp_path, monkeypatch, "llava")
    _, inputs = make_prompt(plan, "llava")
    save_file(inputs, tmp_path / "in")
    options = {"from": "engine", "inputs": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"build it with engine.context_logits=true$"):
        run(write_logits, plan, options)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 0] = 0
    save_file({**inputs, "attention_mask": mask}, tmp_path / "in")
    with pytest.raises(
        UserError, match=r"^from=engine does not support an attention_mask with zeros"
    ):
        run(write_logits, plan, options)


def test_missing_engine_and_failed_start_are_reported(tmp_path, monkeypatch, trtllm):
    plan = plan_for("llava", tmp_path, engine={"context_logits": True})
    ids = {"input_ids": torch.arange(4, 9)[None]}
    save_file(ids, tmp_path / "in")
    options = {"from": "engine", "inputs": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match="is not finished; run the stage 'build' first"):
        run(write_logits, plan, options)
    build_engines(tmp_path, monkeypatch, "llava", engine={"context_logits": True})
    monkeypatch.setenv("FAKE_START_FAILURE", "1")
    with pytest.raises(UserError) as caught:
        run(write_logits, plan, options)
    folder = tmp_path / "fp8" / "engine"
    message = str(caught.value)
    assert message.startswith(f"the engine in {folder} exited with code 1; last output: ")
    assert message.endswith("| RuntimeError: engine was built for another GPU")


def test_evaluate_uses_batches_of_the_engine(tmp_path, monkeypatch, trtllm):
    evaluation = {"from": "engine", "data": "scenes", "limit": 5, "batch": 4}
    plan = build_engines(
        tmp_path, monkeypatch, "llava", engine={"max_batch_size": 3}, evaluate=evaluation
    )  # the fake rejects larger batches
    with pytest.raises(
        VerificationError, match="ignores images"
    ):  # the fake answers the same to every image
        run(evaluate, plan)
    folder = tmp_path / "fp8" / "evaluate"
    settings = store.read_manifest(folder)["settings"]
    assert settings["target"] == "engine"
    assert settings["input"] == store.hash_manifest(tmp_path / "fp8" / "engine")
    answers = store.read_json(folder / "answers.json")
    assert len(answers["own"]) == 5 and len(set(answers["own"].values())) == 1
    expected = load_tokenizer(plan.folder).decode([7, 8], skip_special_tokens=True)
    assert set(answers["own"].values()) == {expected}


def test_failure_stops_all_ranks_with_exit_code_2(tmp_path, monkeypatch, trtllm):
    monkeypatch.setenv("FAKE_FAIL", "1")
    write_checkpoint(plan_for("llava", tmp_path / "work", tensor=2))
    recipe = write_recipe(
        tmp_path, parallel={"tensor": 1, "data": 2}, export={"targets": ["trtllm"], "tensor": 2}
    )
    with running(tmp_path, "nemo_vlm_ptq", "build", recipe) as command:
        code, lines = command.end()
    assert code == 2 and len(trtllm.command_lines()) == 1, lines
    assert lines[-1].startswith(f"{PREFIX}trtllm-build ended with exit code 1; last output")
    assert not [line for line in lines[:-1] if "Traceback" in line or "rror" in line]
