"""Images of a data folder: where they may lie, how large they may be, and what they may hold."""

import json

import pytest
from bad_models import TINY, plan_error, said_by
from PIL import Image
from test_bad_data import add_image, write_questions

from nemo_vlm_ptq.data.questions import load_questions


def write_image_question(folder, name):
    """Write a data folder with one question about an image of any name."""
    write_questions(folder)
    entry = {"imageId": name, "question": "What?", "answer": "yes"}
    (folder / "q.json").write_text(json.dumps({"a": entry}))
    return add_image(folder)


@pytest.mark.parametrize(
    "name", ["../../secret", "/{}/secret", "linked", "folder/linked", "../q", "x" * 300, "a\0b"]
)
def test_images_outside_the_folder_are_not_read(tmp_path, name):
    name = name.replace("/{}", str(tmp_path))
    folder = write_image_question(tmp_path / "data", name)
    Image.new("RGB", (40, 30)).save(tmp_path / "secret.png")
    (folder / "images" / "folder").mkdir()
    for path in (folder / "images" / "linked.png", folder / "images" / "folder" / "linked.png"):
        path.symlink_to(tmp_path / "secret.png")
    questions = load_questions(str(folder), "test", None)
    for action in (questions.check_images, questions.identity):
        said = said_by(action)
        assert "leads out of" in said or "images has no " in said
    said_by(questions.load_image, name)


def test_the_folder_of_images_may_be_a_link_and_have_folders(tmp_path):
    folder = write_image_question(tmp_path / "data", "sub/7")
    (folder / "images").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "sub").mkdir()
    (tmp_path / "elsewhere" / "sub" / "7.png").symlink_to("../7.PNG")
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    questions = load_questions(str(folder), "test", None)
    questions.check_images()
    assert questions.load_image("sub/7").size == (40, 30)


@pytest.mark.parametrize(
    ("mode", "size", "said"),
    [
        ("L", (1, 100_000), "16,384 a side"),
        ("L", (17_000, 400), "16,384 a side"),
        ("L", (100, 1), "one side may be 50 times as long"),
        ("L", (10, 501), "one side may be 50 times as long"),
        ("1", (9_000, 9_000), "in all; resize it"),
        ("I;16", (40, 30), "16 or 32 bits a pixel"),
    ],
)
def test_images_that_take_too_much_memory_are_refused_by_the_plan(tmp_path, mode, size, said):
    folder = write_image_question(tmp_path / "data", "8")
    Image.new(mode, size).save(folder / "images" / "8.png")
    words = (f"calibration.data={folder}", "calibration.samples=1")
    assert said in plan_error(tmp_path, TINY, *words)
    assert str(folder / "images" / "8.png") in plan_error(tmp_path, TINY, *words)


def test_files_that_other_decoders_of_pillow_read_are_no_images(tmp_path):
    folder = write_image_question(tmp_path / "data", "8")
    Image.new("RGB", (8, 8)).save(folder / "images" / "8.jpg", format="EPS")
    assert "is not a readable image" in said_by(
        load_questions(str(folder), "x", None).load_image, "8"
    )


def test_a_missing_image_of_any_question_is_told_by_the_plan(tmp_path):
    for key in ("calibration.data", "evaluate.data"):
        folder = add_image(write_questions(tmp_path / key))
        questions = json.loads((folder / "q.json").read_text())
        questions["2"]["imageId"] = "gone"
        (folder / "q.json").write_text(json.dumps(questions))
        said = plan_error(tmp_path, TINY, "calibration.samples=3", f"{key}={folder}")
        assert said == f"{folder}/images has no gone.jpg, .png, .jpeg or .webp"
