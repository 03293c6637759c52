"""Settings of image processors and values of config.json that cannot work: one line each."""

import json
import shutil

import pytest
from bad_models import TINY, configure, copy_model, plan_error, said_by, write_recipe

from nemo_vlm_ptq.families import llava, read_config
from nemo_vlm_ptq.input_files import read_json
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe


@pytest.fixture
def model(tmp_path):
    return copy_model(tmp_path / "model")


def make(folder):
    """Plan a model folder, and load what preprocesses its questions."""
    plan = make_plan(load_recipe(str(write_recipe(folder.parent, folder))))
    return plan.family.make_preprocessor(plan.folder, plan.config)


# Settings of image processors


def numbers(*values):
    return [[*values], 3, "x", {}, [1, 2], [1, 2, "x"], [1, 2, True], [1e400, 1, 1], [[1, 2, 3]]]


BAD_SETTINGS = {
    "size": [-5, 0, 1_000_000, 1.5, "x", [], {}, {"shortest_edge": -5}, {"shortest_edge": 10**6}],
    "crop_size": [{"height": 64}, {"height": 0, "width": 64}, {"side": 64}, {"height": True}],
    "image_mean": numbers(0.5, 0.5),
    "image_std": [*numbers(0.5, 0.5), [0, 1, 1], [1, -1, 1]],
    "rescale_factor": [0, -1, "x", True, [1]],
    "resample": [9, -1, "bicubic", 1.5],
    "do_resize": [1, "yes", "false"],
    "do_pad": ["no"],
    "image_processor_type": [3, [], {"a": 1}],
}


@pytest.mark.parametrize("key", BAD_SETTINGS)
def test_settings_of_an_image_processor_that_cannot_work_are_named(model, key):
    path, config = model / "preprocessor_config.json", read_config(model)
    settings = json.loads(path.read_text())
    for value in BAD_SETTINGS[key]:
        text = json.dumps(settings | {key: value}).replace("Infinity", "1e400")
        path.write_text(text)
        said = said_by(llava.make_preprocessor, model, config)
        assert str(model) in said and len(said) < 700
    nested = {"image_processor": settings | {key: BAD_SETTINGS[key][0]}}
    path.write_text(json.dumps(settings))
    (model / "processor_config.json").write_text(json.dumps(nested))
    assert "processor_config.json" in said_by(llava.make_preprocessor, model, config)


def test_images_that_are_not_cropped_to_one_shape_are_refused(tmp_path, model):
    path = model / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    for changes in ({"do_center_crop": False}, {"do_resize": False, "do_center_crop": False}):
        path.write_text(json.dumps(settings | changes))
        said = plan_error(tmp_path, model)
        assert said.startswith(f"{model}: the image processor does not match the vision tower: ")
        assert "expected 64*64" in said


@pytest.mark.parametrize("value", [None, 0, -1, 1.5, "4", True, 10**6])
def test_phi_needs_a_number_of_crops(tmp_path, value):
    from nemo_vlm_ptq.families import phi

    model = tmp_path / "phi"
    shutil.copytree(TINY.parent / "tiny-phi", model)
    path = model / "preprocessor_config.json"
    settings = json.loads(path.read_text()) | {"num_crops": value}
    if value is None:
        del settings["num_crops"]
    path.write_text(json.dumps(settings))
    assert "num_crops" in said_by(phi.make_preprocessor, model, read_config(model))


# config.json

BAD_CONFIG = {
    "architectures": ["llava", 3, [3], {"a": 1}],
    "model_type": [3, [], {}],
    "torch_dtype": [3, {}],
    "image_token_index": [None, -1, 10**30, "3", 1.5, []],
    "text_config": [3, "x", [1]],
    "text_config.rope_theta": [None, "10000.0", 0, -1, [], True],
    "text_config.rms_norm_eps": [None, "1e-5", 0, -1],
    "text_config.hidden_size": [None, "256", 0, -256, 256.5, 10**30],
    "text_config.vocab_size": [None, "512", 0, 10**30],
    "text_config.head_dim": ["32", 0, -32, 1.5],
    "text_config.num_hidden_layers": [None, "4", 0, -1, 10**30],
    "text_config.num_attention_heads": ["8", 0, -8],
    "text_config.num_key_value_heads": ["8", 0, -8],
    "text_config.max_position_embeddings": [None, "1024", 0, -5, 10**30],
    "vision_config": [3, "x", [1]],
    "vision_config.image_size": [None, "64", 0, -64],
    "vision_config.patch_size": [None, "8", 0, -8],
    "vision_feature_layer": ["x", 99, [99], {}],
}


@pytest.mark.parametrize("key", BAD_CONFIG)
def test_values_of_config_json_that_cannot_work_are_told_in_one_line(model, key):
    whole = (model / "config.json").read_text()
    for value in BAD_CONFIG[key]:
        configure(model, {key: value})
        said = said_by(make, model)
        assert len(said) < 700
        (model / "config.json").write_text(whole)


def test_json_is_read_strictly(tmp_path):
    path = tmp_path / "x.json"
    for text in ("NaN", "[Infinity]", '{"a": -Infinity}', '{"a": 1, "a": 2}', "[" * 100_000):
        path.write_text(text)
        assert said_by(read_json, path).startswith(f"{path} is not valid JSON: ")
    assert "cannot be read" in said_by(read_json, tmp_path / ("x" * 300))
