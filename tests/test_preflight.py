"""Preflight check: a question is preprocessed, and the workdir is tested, before anything runs."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from bad_models import TINY, configure, copy_model, plan_error, write_recipe

from nemo_vlm_ptq.errors import disk_write_error
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.planning.preflight import check_questions
from nemo_vlm_ptq.recipe import load_recipe


def test_an_image_processor_of_another_vision_tower_is_rejected(tmp_path):
    model = copy_model(tmp_path / "model")
    settings = json.loads((model / "preprocessor_config.json").read_text())
    small = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    (model / "preprocessor_config.json").write_text(json.dumps(settings | small))
    message = plan_error(tmp_path, model)
    assert message.startswith(f"{model}: the image processor does not match the vision tower: ")
    assert "32*32" in message and "64*64" in message


@pytest.mark.parametrize(
    "settings",
    [{"rescale_factor": 1e300}, {"image_mean": [0, 1e300, 0]}, {"image_std": [1e-300] * 3}],
)
def test_settings_that_make_pixels_infinite_are_rejected(tmp_path, settings):
    model = copy_model(tmp_path / "model")
    whole = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps(whole | settings))
    assert plan_error(tmp_path, model).startswith(f"{model}: the image processor makes NaN or Inf ")


def test_a_tokenizer_without_the_image_token_of_the_config_is_rejected(tmp_path):
    model = configure(copy_model(tmp_path / "model"), {"image_token_index": 509})
    message = plan_error(tmp_path, model)
    assert "image token of config.json" in message


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_a_missing_file_of_the_preprocessor_is_reported_before_anything_runs(tmp_path, name):
    model = copy_model(tmp_path / "model")
    (model / name).unlink()
    message = plan_error(tmp_path, model)
    assert message.startswith(f"{model} has no {name}")
    assert "required to preprocess questions" in message
    plan = make_plan(load_recipe(str(write_recipe(tmp_path, model))))
    check_questions(plan, ["import", "solve"])  # these stages need no questions


def test_settings_of_the_image_processor_may_be_in_processor_config_json(tmp_path):
    model = copy_model(tmp_path / "model")
    settings = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").unlink()
    config = {"processor_class": "LlavaProcessor", "image_processor": settings}
    (model / "processor_config.json").write_text(json.dumps(config))
    plan = make_plan(load_recipe(str(write_recipe(tmp_path, model))))
    check_questions(plan, ["observe", "evaluate"])


def test_data_is_read_before_anything_runs(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "q.json").write_text("{")
    message = plan_error(tmp_path, TINY, f"calibration.data={folder}")
    assert message.startswith(f"{folder}/q.json is not valid JSON: ")
    (folder / "q.json").write_text("{}")
    message = plan_error(tmp_path, TINY, f"evaluate.data={folder}")
    assert message == f"data '{folder}' holds no questions"


def test_a_workdir_that_is_not_writable_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    expected = f"workdir {tmp_path}/work: {tmp_path} is not writable; choose another workdir"
    assert plan_error(tmp_path) == expected


def test_a_full_disk_is_recognized_behind_other_errors(tmp_path, monkeypatch):
    reason = "No space left on device"
    direct = OSError(28, os.strerror(28), "/x")
    chained = RuntimeError("writing failed")
    chained.__cause__ = direct
    quoted = RuntimeError(f'IoError(Os {{ code: 28, message: "{reason}" }})')
    for error in (direct, chained, quoted):
        assert disk_write_error(error, tmp_path) == reason
        assert disk_write_error(error, tmp_path / "missing") == reason
    assert disk_write_error(KeyError("x"), tmp_path) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
    assert disk_write_error(RuntimeError("unexpected pos 704 vs 598"), tmp_path) == reason
