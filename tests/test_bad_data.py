"""Bad questions and images: one line that says what and where."""

import json
import os

import pytest
from bad_models import TINY, plan_refusal, said_by, write_recipe
from PIL import Image

from nemo_vlm_ptq.data.questions import evaluation_questions, load_questions
from nemo_vlm_ptq.planning.plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.workdir import store


def test_a_data_folder_that_is_not_there_stops_the_plan(tmp_path):
    said = "data '/nowhere' is neither 'scenes' nor a folder"
    assert said_by(load_questions, "/nowhere", "test", None) == said
    for key in ("calibration.data", "evaluate.data"):
        assert said in plan_refusal(tmp_path, TINY, f"{key}=/nowhere")


def test_a_data_folder_needs_one_file_of_questions(tmp_path):
    said = f"{tmp_path} must hold one questions .json, found "
    assert said_by(load_questions, str(tmp_path), "test", None) == said + "0"
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("{}")
    assert said_by(load_questions, str(tmp_path), "test", None) == said + "2"


BAD = [
    "{",
    "[]",
    '{"7": 3}',
    '{"7": {"question": "What?"}}',
    '{"7": {"question": null, "answer": "x"}}',
    '{"7": {"question": 3, "answer": "x"}}',
    '{"7": {"question": "What?", "answer": ["x"]}}',
    '{"7": {"question": "\\ud800", "answer": "x"}}',
]


@pytest.mark.parametrize("text", BAD)
def test_a_file_without_questions_in_gqas_format_is_named(tmp_path, text):
    (tmp_path / "q.json").write_text(text)
    assert str(tmp_path / "q.json") in said_by(load_questions, str(tmp_path), "test", None)


def gqa_folder(folder):
    """Three questions about one picture that is not there."""
    folder.mkdir()
    entry = {"imageId": "7", "question": "What?", "answer": "yes"}
    (folder / "q.json").write_text(json.dumps({str(number): entry for number in range(3)}))
    return folder


def with_picture(folder):
    """The picture is there, with an ending as cameras write it."""
    (folder / "images").mkdir()
    Image.new("RGB", (40, 30)).save(folder / "images" / "7.PNG")
    return folder


def test_a_picture_that_is_missing_or_broken_is_named(tmp_path):
    folder = gqa_folder(tmp_path / "data")
    image = load_questions(str(folder), "test", None).image
    assert said_by(image, "7") == f"{folder}/images has no 7.jpg, .png, .jpeg or .webp"
    (folder / "images").mkdir()
    (folder / "images" / "7.jpg").write_bytes(b"no picture")
    assert str(folder / "images" / "7.jpg") in said_by(image, "7")


def test_a_picture_too_large_to_be_meant_is_named(tmp_path, monkeypatch):
    folder = with_picture(gqa_folder(tmp_path / "data"))
    image = load_questions(str(folder), "test", None).image
    assert image("7").size == (40, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    said = said_by(image, "7")
    assert said.startswith(
        f"{folder}/images/7.PNG is no readable picture: Image size (1200 pixels)"
    )


def test_other_questions_answers_or_pictures_are_other_data(tmp_path):
    folder = with_picture(gqa_folder(tmp_path / "data"))

    def identity():
        return load_questions(str(folder), "test", None).identity()

    first = identity()
    assert identity() == first
    (folder / "images" / "8.png").write_bytes(b"nobody asks about it")
    assert identity() == first
    text = (folder / "q.json").read_text()
    (folder / "q.json").write_text(text.replace("yes", "no"))
    assert identity() != first
    (folder / "q.json").write_text(text)
    os.utime(folder / "images" / "7.PNG", ns=(1, 1))
    assert identity() != first
    (folder / "images" / "7.PNG").unlink()
    assert "images has no 7.jpg" in said_by(identity)


def test_statistics_of_other_data_are_refused(tmp_path):
    from nemo_vlm_ptq.stages.observe import observe_settings

    folder = with_picture(gqa_folder(tmp_path / "data"))
    recipe = write_recipe(tmp_path, calibration={"data": str(folder), "samples": 3})
    plan, work = make_plan(load_recipe(str(recipe))), tmp_path / "work"
    for name in ("megatron", "statistics"):
        (work / name).mkdir(parents=True)
    manifest = {"stage": "observe", "files": {}}
    store.write_json(work / "megatron" / "manifest.json", manifest | {"settings": {}})
    settings = {"settings": observe_settings(plan, work)}
    store.write_json(work / "statistics" / "manifest.json", manifest | settings)
    assert store.is_done(work / "statistics", observe_settings(plan, work))
    (folder / "q.json").write_text((folder / "q.json").read_text().replace("What", "Which"))
    said = said_by(store.is_done, work / "statistics", observe_settings(plan, work))
    assert "was made with other questions than there are now; " in said


def test_a_question_longer_than_the_model_reads_is_named(tmp_path):
    from nemo_vlm_ptq.stages.observe import calibration_micro_batches

    folder = with_picture(gqa_folder(tmp_path / "data"))
    entry = {"imageId": "7", "question": "What?" + " and" * 2000, "answer": "yes"}
    (folder / "q.json").write_text(json.dumps({"a": entry}))
    recipe = write_recipe(tmp_path, calibration={"data": str(folder), "samples": 1})
    chunks, prepare = calibration_micro_batches(make_plan(load_recipe(str(recipe))))
    said = said_by(prepare, chunks[0], True)
    assert said.startswith(f"question 'a' of {folder} takes ")
    assert "image included, and the model has 1024 positions" in said


def test_models_are_scored_on_questions_about_images(tmp_path):
    folder = gqa_folder(tmp_path / "data")
    entry = {"imageId": None, "question": "What?", "answer": 3}
    (folder / "q.json").write_text(json.dumps({"a": entry}))
    said = said_by(evaluation_questions, str(folder), None)
    assert said.startswith(f"1 of 1 questions of {folder} have no imageId, first 'a'; ")


def test_more_samples_than_questions_are_refused_with_both_numbers(tmp_path):
    from nemo_vlm_ptq.stages.observe import calibration_micro_batches

    folder = gqa_folder(tmp_path / "data")
    calibration = {"data": str(folder), "samples": 4}
    plan = make_plan(load_recipe(str(write_recipe(tmp_path, calibration=calibration))))
    said = f"calibration.samples=4 but {folder} has only 3 questions"
    assert said_by(calibration_micro_batches, plan) == said


def test_questions_without_images_are_refused_unless_text_is_asked_for(tmp_path):
    from nemo_vlm_ptq.stages.observe import calibration_micro_batches

    folder = gqa_folder(tmp_path / "data")
    (folder / "q.json").write_text(json.dumps({"a": {"question": "What?", "answer": "yes"}}))
    calibration = {"data": str(folder), "samples": 1}
    recipe = write_recipe(tmp_path, calibration=calibration)
    said = said_by(calibration_micro_batches, make_plan(load_recipe(str(recipe))))
    assert "1 of 1 questions" in said and "no imageId, first 'a'" in said
    assert "set calibration.modality=text" in said
    plan = make_plan(load_recipe(str(recipe), ["calibration.modality=text"]))
    chunks, prepare = calibration_micro_batches(plan)
    assert not prepare(chunks[0], True)[0].is_image.any()


def test_a_question_with_a_mark_of_an_image_is_named(tmp_path):
    from nemo_vlm_ptq.stages.observe import calibration_micro_batches

    folder = gqa_folder(tmp_path / "data")
    (folder / "q.json").write_text(json.dumps({"a": {"question": "<image>\nIt?", "answer": "x"}}))
    calibration = {"data": str(folder), "samples": 1, "modality": "text"}
    recipe = write_recipe(tmp_path, calibration=calibration)
    chunks, prepare = calibration_micro_batches(make_plan(load_recipe(str(recipe))))
    said = said_by(prepare, chunks[0], True)
    assert said.startswith("question 'a' has marks of images in its own text or answer (1 in its")


def test_a_kind_of_token_that_never_came_is_refused():
    from nemo_vlm_ptq.stages.observe import _check_modalities

    said = said_by(_check_modalities, {"text": 9, "image": 0}, "image_text")
    assert said.startswith("calibration.modality=image_text, but the calibration data brought no")
    _check_modalities({"text": 9, "image": 0}, "text")
