"""What plan tries: a question through the prompt and the tower's shapes, and the workdir."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from bad_models import TINY, configure, copy_model, plan_refusal, write_recipe

from nemo_vlm_ptq.errors import disk_write_error
from nemo_vlm_ptq.planning.plan import make_plan
from nemo_vlm_ptq.planning.preflight import check_questions
from nemo_vlm_ptq.recipe import load_recipe


def test_an_image_processor_of_another_tower_is_refused(tmp_path):
    model = copy_model(tmp_path / "model")
    settings = json.loads((model / "preprocessor_config.json").read_text())
    small = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    (model / "preprocessor_config.json").write_text(json.dumps(settings | small))
    said = plan_refusal(tmp_path, model)
    assert said.startswith(f"{model}: the image processor does not fit the tower: ")
    assert "32*32" in said and "64*64" in said


def test_an_image_token_that_the_tokenizer_does_not_make_is_refused(tmp_path):
    model = configure(copy_model(tmp_path / "model"), {"image_token_index": 509})
    said = "the tokenizer makes no image token of the prompt's mark: "
    assert plan_refusal(tmp_path, model).startswith(said)


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_a_file_that_questions_need_is_missed_before_anything_runs(tmp_path, name):
    model = copy_model(tmp_path / "model")
    (model / name).unlink()
    said = plan_refusal(tmp_path, model)
    assert said.startswith(f"{model} has no {name}") and "questions need" in said
    plan = make_plan(load_recipe(str(write_recipe(tmp_path, model))))
    check_questions(plan, ["import", "solve"])  # ask nothing


def test_settings_of_the_image_processor_may_lie_in_the_newer_file(tmp_path):
    model = copy_model(tmp_path / "model")
    settings = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").unlink()
    whole = {"processor_class": "LlavaProcessor", "image_processor": settings}
    (model / "processor_config.json").write_text(json.dumps(whole))
    plan = make_plan(load_recipe(str(write_recipe(tmp_path, model))))
    check_questions(plan, ["observe", "evaluate"])


def test_data_is_read_before_anything_runs(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "q.json").write_text("{")
    word = f"calibration.data={folder}"
    assert plan_refusal(tmp_path, TINY, word).startswith(f"{folder}/q.json is not JSON: ")
    (folder / "q.json").write_text("{}")
    said = f"data '{folder}' holds no questions"
    assert plan_refusal(tmp_path, TINY, f"evaluate.data={folder}") == said


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, mode: str(place) != str(tmp_path))
    said = f"workdir {tmp_path}/work: {tmp_path} cannot be written; choose another workdir"
    assert plan_refusal(tmp_path) == said


def test_a_full_disk_is_found_behind_what_others_make_of_it(tmp_path, monkeypatch):
    said = "No space left on device"
    full = OSError(28, os.strerror(28), "/x")
    other = RuntimeError("writing failed")
    other.__cause__ = full
    text = RuntimeError(f'IoError(Os {{ code: 28, message: "{said}" }})')
    for error in (full, other, text):
        assert (
            disk_write_error(error, tmp_path) == disk_write_error(error, tmp_path / "none") == said
        )
    assert disk_write_error(KeyError("x"), tmp_path) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
    assert disk_write_error(RuntimeError("unexpected pos 704 vs 598"), tmp_path) == said
