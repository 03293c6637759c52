"""Questions about several images: prompts of every family, and data that the model cannot take."""

import json
from importlib import import_module
from itertools import product

import pytest
import torch
from bad_models import TINY, copy_model, plan_error
from processors import WRITERS
from test_family_prompts import QUESTION, random_image

from nemo_vlm_ptq.families.base import ImageInputs
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.sources.decoder_weights import read_vision

observe = import_module("nemo_vlm_ptq.stages.observe")  # its package exports a function of the name
SIZES = (60, 40), (30, 50)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> folder of a random model."""
    home = tmp_path_factory.mktemp("families")
    for name, write in WRITERS.items():
        write(home / name)
    return {name: home / name for name in WRITERS} | {"llava": TINY}


def open_folder(folder):
    """Return the plan of a model folder, and what preprocesses its questions."""
    words = [f"model={folder}", "parallel.tensor=1", "quantize.format=int8_wo"]
    plan = make_plan(load_recipe("quickstart", [*words, "export.targets=[compressed_tensors]"]))
    return plan, plan.family.make_preprocessor(plan.folder, plan.config)


def is_chained(both, one, other):
    """Return whether ids are P A B S, where those of single images are P A S and P B S."""
    for start, end in product(range(1, len(one)), range(5, 80)):
        if one[:start] != other[:start] or one[-end:] != other[-end:]:
            continue
        if both == one[: len(one) - end] + other[start:]:
            return True
    return False


@pytest.mark.parametrize(
    "family", [*(name for name in WRITERS if name != "llava_onevision"), "llava"]
)
def test_images_stand_in_the_prompt_one_after_another_before_the_question(folders, family):
    plan, preprocess = open_folder(folders[family])
    images = [random_image(*size) for size in SIZES]
    alone = [preprocess("q", QUESTION, image) for image in images]
    both = preprocess("q", QUESTION, images)
    ids = [sample.input_ids.clamp(min=-1).tolist() for sample in (both, *alone)]
    assert is_chained(*ids)
    assert int(both.is_image.sum()) == sum(int(sample.is_image.sum()) for sample in alone)
    again = preprocess("q", QUESTION, [sample.images.to_meta() for sample in alone])
    assert torch.equal(again.input_ids, both.input_ids)
    assert again.images.pixel_values.shape == both.images.pixel_values.shape
    vision = plan.family.build_vision(plan.config, read_vision(plan), dtype=torch.float32)
    with torch.no_grad():
        expected = torch.cat([vision(sample.images) for sample in alone])
        assert torch.allclose(vision(both.images), expected, rtol=1e-4, atol=1e-5)
    if both.positions is not None:
        assert torch.equal(
            plan.family.positions(plan.config, both.is_image, both.images), both.positions
        )


def write_pairs(folder, **more):
    """Write a data folder with a question about one image and one about two."""
    (folder / "images").mkdir(parents=True)
    for name in ("a", "b"):
        random_image(64, 64).save(folder / "images" / f"{name}.png")
    asked = {"question": "What is it?", "answer": "red"}
    entries = {"one": {"imageId": "a"} | asked, "two": {"imageId": ["b", "a"]} | asked} | more
    (folder / "q.json").write_text(json.dumps(entries))
    return folder


@pytest.mark.parametrize("key", ["calibration", "evaluate"])
def test_a_family_that_takes_one_image_is_told_by_the_plan(folders, tmp_path, key):
    data = write_pairs(tmp_path / "data")
    words = (f"{key}.data={data}", "calibration.samples=2", "export.targets=[compressed_tensors]")
    said = plan_error(tmp_path, folders["llava_onevision"], *words)
    assert said == (
        f"question 'two' of {data} has 2 images, and family llava_onevision takes one for a "
        "question; remove it, or choose other data"
    )


def test_a_chat_template_that_shows_one_image_is_told_by_the_plan(tmp_path):
    data, model = write_pairs(tmp_path / "data"), copy_model(tmp_path / "model")
    template = "USER: <image>\n{{ messages[0].content }} ASSISTANT:"
    (model / "chat_template.jinja").write_text(template)
    said = plan_error(tmp_path, model, f"calibration.data={data}", "calibration.samples=2")
    assert said == (
        "question 'two' has 2 images, of which its prompt shows 1: the chat template takes one "
        "image; remove the question"
    )


def test_each_image_of_a_question_must_exist(tmp_path):
    gone = {"imageId": ["a", "gone"], "question": "What?", "answer": "red"}
    data = write_pairs(tmp_path / "data", gone=gone)
    said = plan_error(tmp_path, TINY, f"calibration.data={data}", "calibration.samples=3")
    assert said == f"{data}/images has no gone.jpg, .png, .jpeg or .webp"


def test_calibration_shows_all_images_of_a_question(tmp_path):
    data = write_pairs(tmp_path / "data")
    words = [f"calibration.data={data}", "calibration.samples=2", "parallel.tensor=1"]
    plan = make_plan(load_recipe("quickstart", [f"model={TINY}", *words]))
    (batch,), preprocess = observe.calibration_micro_batches(plan)
    one, two = preprocess(batch, True)
    assert torch.equal(two.images.pixel_values[1:], one.images.pixel_values)
    assert int(two.is_image.sum()) == 2 * int(one.is_image.sum())
    for sample, other in zip((one, two), preprocess(batch, False), strict=True):
        assert torch.equal(sample.input_ids, other.input_ids)


def test_without_pixels_inputs_of_several_images_keep_their_sizes():
    from nemo_vlm_ptq.families.several_images import join_images

    parts = [
        ImageInputs(torch.ones(n, 3, 4 + n, 9 - n), torch.tensor([[4 + n, 9 - n]] * n))
        for n in (1, 2)
    ]
    joined = join_images(parts)
    assert joined.pixel_values.shape == (3, 3, 6, 8) and joined.image_sizes.tolist() == [
        [5, 8],
        [6, 7],
        [6, 7],
    ]
    assert joined.pixel_values.sum() == sum(part.pixel_values.sum() for part in parts)
    assert join_images([part.to_meta() for part in parts]).pixel_values.shape == (3, 3, 6, 8)
    assert join_images([]) is None and join_images(parts[:1]) is parts[0]


def test_an_engine_takes_one_image_for_a_question(tmp_path):
    data = write_pairs(tmp_path / "data")
    words = (f"evaluate.data={data}", "evaluate.from=engine", "export.targets=[trtllm]")
    stages = "stages=[observe, solve, export, build, evaluate]"
    said = plan_error(tmp_path, TINY, *words, stages, "quantize.format=fp8")
    assert said == (
        f"question 'two' of {data} has 2 images, and a TensorRT-LLM engine takes one for a "
        "question; remove it, or choose other data"
    )
