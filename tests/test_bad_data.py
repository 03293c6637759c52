"""Errors of bad questions and images: one line that names the file and the value."""

import json
import os

import pytest
from bad_models import TINY, configure, copy_model, plan_error, said_by, write_recipe
from PIL import Image

from nemo_vlm_ptq.data.questions import evaluation_questions, load_questions
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.workdir import store


def test_a_missing_data_folder_is_rejected_by_the_plan(tmp_path):
    said = "data must be 'scenes', 'hard_scenes' or an existing folder, got '/nowhere'"
    assert said_by(load_questions, "/nowhere", "test", None) == said
    for key in ("calibration.data", "evaluate.data"):
        assert said in plan_error(tmp_path, TINY, "calibration.data=scenes", f"{key}=/nowhere")


def test_a_data_folder_must_hold_one_file_of_questions(tmp_path):
    said = f"{tmp_path} must hold exactly one .json file of questions, got "
    assert said_by(load_questions, str(tmp_path), "test", None) == said + "0"
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("{}")
    assert said_by(load_questions, str(tmp_path), "test", None) == said + "2"


NOT_GQA = [
    "{",
    "[]",
    '{"7": 3}',
    '{"7": {"question": "What?"}}',
    '{"7": {"question": null, "answer": "x"}}',
    '{"7": {"question": 3, "answer": "x"}}',
    '{"7": {"question": "What?", "answer": ["x"]}}',
    '{"7": {"question": "\\ud800", "answer": "x"}}',
    '{"7": {"question": "What?", "answer": true}}',
    '{"7": {"question": "What?", "answer": 1e999}}',
    *(
        f'{{"7": {{"question": "What?", "answer": "x", {more}}}}}'
        for more in (
            *('"imageId": true', '"imageId": []', '"imageId": 1.5', '"imageId": {"7": 7}'),
            *('"imageId": [["7"]]', '"imageId": ["7", null]', '"imageId": ["7", ""]'),
            *('"imageId": ["7", false]', '"imageId": [1.5, 7]'),
            *('"isBalanced": null', '"isBalanced": "false"', '"isBalanced": 0', '"types": ["x"]'),
        )
    ),
]


@pytest.mark.parametrize("text", NOT_GQA)
def test_the_error_of_a_file_in_another_format_names_it(tmp_path, text):
    (tmp_path / "q.json").write_text(text)
    assert str(tmp_path / "q.json") in said_by(load_questions, str(tmp_path), "test", None)


def test_an_image_may_have_the_number_0(tmp_path):
    (tmp_path / "q.json").write_text('{"7": {"imageId": 0, "question": "What?", "answer": 0}}')
    (question,) = evaluation_questions(str(tmp_path), None).items
    assert (question.images, question.answer) == (("0",), "0")


def test_a_list_holds_the_images_of_a_question_in_order(tmp_path):
    entry = {"imageId": [7, "a/b", 7], "question": "Which?", "answer": "first"}
    one = entry | {"imageId": ["7"]}
    (tmp_path / "q.json").write_text(json.dumps({"1": entry, "2": one, "3": one | {"imageId": 7}}))
    found = load_questions(str(tmp_path), "test", None)
    assert [item.images for item in found.items] == [("7", "a/b", "7"), ("7",), ("7",)]
    assert found.image_names() == ["7", "a/b"]
    assert [item.record()["image"] for item in found.items] == [["7", "a/b", "7"], "7", "7"]


def test_a_question_has_64_images_at_most(tmp_path):
    entry = {"question": "Which?", "answer": "first"}
    (tmp_path / "q.json").write_text(json.dumps({"1": entry | {"imageId": [7] * 64}}))
    assert len(load_questions(str(tmp_path), "test", None).items[0].images) == 64
    (tmp_path / "q.json").write_text(json.dumps({"1": entry | {"imageId": [7] * 65}}))
    said = said_by(load_questions, str(tmp_path), "test", None)
    assert said.endswith("question '1' is not in GQA's format: imageId may name 64 images, got 65")


def write_questions(folder):
    """Write a data folder with three questions about one image that does not exist."""
    folder.mkdir()
    entry = {"imageId": "7", "question": "What?", "answer": "yes"}
    (folder / "q.json").write_text(json.dumps({str(number): entry for number in range(3)}))
    return folder


def add_image(folder):
    """Add the image, with an upper case suffix."""
    (folder / "images").mkdir()
    Image.new("RGB", (40, 30)).save(folder / "images" / "7.PNG")
    return folder


def test_the_error_of_a_missing_or_damaged_image_names_it(tmp_path):
    folder = write_questions(tmp_path / "data")
    load_image = load_questions(str(folder), "test", None).load_image
    assert said_by(load_image, "7") == f"{folder}/images has no 7.jpg, .png, .jpeg or .webp"
    (folder / "images").mkdir()
    (folder / "images" / "7.jpg").write_bytes(b"not an image")
    assert said_by(load_image, "7") == (
        f"{folder}/images/7.jpg is not a readable image: cannot identify its format; supported: "
        "JPEG, PNG, WEBP, GIF, BMP"
    )


def test_the_error_of_a_decompression_bomb_names_it(tmp_path, monkeypatch):
    folder = add_image(write_questions(tmp_path / "data"))
    load_image = load_questions(str(folder), "test", None).load_image
    assert load_image("7").size == (40, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    said = said_by(load_image, "7")
    assert said.startswith(
        f"{folder}/images/7.PNG is not a readable image: Image size (1200 pixels)"
    )


def test_the_identity_depends_on_questions_answers_and_images(tmp_path):
    folder = add_image(write_questions(tmp_path / "data"))

    def identity():
        return load_questions(str(folder), "test", None).identity()

    first = identity()
    assert identity() == first
    (folder / "images" / "8.png").write_bytes(b"unused")
    assert identity() == first
    text = (folder / "q.json").read_text()
    (folder / "q.json").write_text(text.replace("yes", "no"))
    assert identity() != first
    (folder / "q.json").write_text(text)
    os.utime(folder / "images" / "7.PNG", ns=(1, 1))
    assert identity() != first
    (folder / "images" / "7.PNG").unlink()
    assert "images has no 7.jpg" in said_by(identity)


def test_statistics_of_other_data_are_rejected(tmp_path):
    from nemo_vlm_ptq.stages.settings import observation, observed_settings

    folder = add_image(write_questions(tmp_path / "data"))
    recipe = write_recipe(tmp_path, calibration={"data": str(folder), "samples": 3})
    plan, statistics = make_plan(load_recipe(str(recipe))), tmp_path / "work" / "statistics"
    statistics.mkdir(parents=True)
    assert observed_settings(plan, statistics) is None
    made = observation(plan) | {"moments": [], "kept": True, "solved": {}}
    manifest = {"stage": "observe", "files": {}, "facts": {}, "settings": made}
    store.write_json(statistics / "manifest.json", manifest)
    assert observed_settings(plan, statistics) == made
    (folder / "q.json").write_text((folder / "q.json").read_text().replace("What", "Which"))
    said = said_by(observed_settings, plan, statistics)
    assert "was made with different questions; " in said


def test_scales_of_other_data_are_rejected(tmp_path):
    from nemo_vlm_ptq.stages.settings import solve_settings

    folder = add_image(write_questions(tmp_path / "data"))
    recipe = write_recipe(tmp_path, calibration={"data": str(folder), "samples": 3})
    plan, work = make_plan(load_recipe(str(recipe))), tmp_path / "work"
    (fmt,), scales = plan.formats, work / "fp8" / "scales"
    scales.mkdir(parents=True)
    settings = solve_settings(plan, work, fmt)
    manifest = {"stage": "solve", "files": {}, "facts": {}, "settings": settings}
    store.write_json(scales / "manifest.json", manifest)
    assert store.is_finished(scales, solve_settings(plan, work, fmt))
    (folder / "q.json").write_text((folder / "q.json").read_text().replace("What", "Which"))
    said = said_by(store.is_finished, scales, solve_settings(plan, work, fmt))
    assert "was made with different statistics; " in said


def test_the_error_of_a_question_longer_than_the_context_names_it(tmp_path):
    from nemo_vlm_ptq.stages.observe import calibration_micro_batches

    folder = add_image(write_questions(tmp_path / "data"))
    entry = {"imageId": "7", "question": "What?" + " and" * 2000, "answer": "yes"}
    (folder / "q.json").write_text(json.dumps({"a": entry}))
    recipe = write_recipe(tmp_path, calibration={"data": str(folder), "samples": 1})
    micro_batches, preprocess = calibration_micro_batches(make_plan(load_recipe(str(recipe))))
    said = said_by(preprocess, micro_batches[0], True)
    assert said.startswith(f"question 'a' of {folder} has ")
    assert "image included, and the model has 1024 positions" in said
    words = (f"calibration.data={folder}", "calibration.samples=1")
    assert plan_error(tmp_path, TINY, *words).startswith(f"question 'a' of {folder} has ")


def test_evaluation_questions_must_have_images(tmp_path):
    folder = write_questions(tmp_path / "data")
    entry = {"imageId": None, "question": "What?", "answer": 3}
    (folder / "q.json").write_text(json.dumps({"a": entry}))
    said = said_by(evaluation_questions, str(folder), None)
    assert said.startswith(f"1 of 1 questions of {folder} have no imageId, first 'a'; ")


def test_more_samples_than_questions_are_rejected(tmp_path):
    from nemo_vlm_ptq.stages.observe import calibration_micro_batches

    folder = write_questions(tmp_path / "data")
    calibration = {"data": str(folder), "samples": 4}
    plan = make_plan(load_recipe(str(write_recipe(tmp_path, calibration=calibration))))
    said = f"calibration.samples=4 but {folder} has only 3 questions"
    assert said_by(calibration_micro_batches, plan) == said


def test_calibration_questions_must_have_images_unless_the_modality_is_text(tmp_path):
    from nemo_vlm_ptq.stages.observe import calibration_micro_batches

    folder = write_questions(tmp_path / "data")
    (folder / "q.json").write_text(json.dumps({"a": {"question": "What?", "answer": "yes"}}))
    calibration = {"data": str(folder), "samples": 1}
    recipe = write_recipe(tmp_path, calibration=calibration)
    said = said_by(calibration_micro_batches, make_plan(load_recipe(str(recipe))))
    assert "1 of 1 questions" in said and "no imageId, first 'a'" in said
    assert "set calibration.modality=text" in said
    plan = make_plan(load_recipe(str(recipe), ["calibration.modality=text"]))
    micro_batches, preprocess = calibration_micro_batches(plan)
    assert not preprocess(micro_batches[0], True)[0].is_image.any()


def test_the_error_of_a_question_with_an_image_placeholder_names_it(tmp_path):
    from nemo_vlm_ptq.stages.observe import calibration_micro_batches

    folder = write_questions(tmp_path / "data")
    (folder / "q.json").write_text(json.dumps({"a": {"question": "<image>\nIt?", "answer": "x"}}))
    calibration = {"data": str(folder), "samples": 1, "modality": "text"}
    recipe = write_recipe(tmp_path, calibration=calibration)
    micro_batches, preprocess = calibration_micro_batches(make_plan(load_recipe(str(recipe))))
    said = said_by(preprocess, micro_batches[0], True)
    assert said.startswith(
        "question 'a': its text and answer must not hold image placeholders (got 1 in the prompt"
    )


def test_a_modality_without_tokens_is_rejected():
    from nemo_vlm_ptq.stages.observe import _check_modalities

    said = said_by(_check_modalities, {"text": 9, "image": 0}, "image_text")
    assert said.startswith("calibration.modality=image_text, but the calibration data has no")
    _check_modalities({"text": 9, "image": 0}, "text")


def test_a_fifo_in_place_of_the_questions_is_named(tmp_path):
    os.mkfifo(tmp_path / "q.json")
    assert "is a FIFO" in said_by(load_questions, str(tmp_path), "test", None)


@pytest.mark.parametrize("level", ["scenes", "hard_scenes"])
def test_the_scenes_have_a_limit(tmp_path, level):
    words = f"calibration.data={level}", "calibration.samples=20000"
    said = plan_error(tmp_path, TINY, *words)
    assert said == f"data {level} has 10000 questions at most, got 20000"


def test_tokens_beyond_the_embedding_are_told_by_the_plan(tmp_path):
    folder = add_image(write_questions(tmp_path / "data"))
    questions = json.loads((folder / "q.json").read_text())
    questions["2"]["question"] = "What is at <loc>?"
    (folder / "q.json").write_text(json.dumps(questions))
    model = copy_model(tmp_path / "model")
    words = (f"calibration.data={folder}", "calibration.samples=3", f"evaluate.data={folder}")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocab, added = tokenizer["model"]["vocab"], tokenizer["added_tokens"]
    vocab |= {f"<filler{i}>": i for i in set(range(512)) - set(vocab.values())}
    added.append({**added[3], "id": 512, "content": "<loc>"})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = plan_error(tmp_path, model, *words)
    assert said.startswith(f"{model}: question '2' has the token 512, and the embedding has 512")
    questions["2"]["question"] = "What?"
    questions["2"]["answer"] = "<loc>"
    (folder / "q.json").write_text(json.dumps(questions))
    assert "question '2' has the token 512" in plan_error(tmp_path, model, *words)
    configure(model, {"image_token_index": 512})
    vocab["<unused3>"] = vocab.pop("<image>")
    added[3]["content"], added[-1]["content"] = "<unused3>", "<image>"
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has the image token 512" in plan_error(tmp_path, model, *words)
