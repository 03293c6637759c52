"""A model's config with a recipe's values in it, and the dtype that is planned and written."""

import json
import shutil
from dataclasses import replace

from bad_models import ROOT, copy_model, damage, plan_refusal, write_recipe

from nemo_vlm_ptq.planning.plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe


def test_a_recipe_changes_single_values_of_a_config_inside_the_config(tmp_path):
    recipe = str(write_recipe(tmp_path))
    before = make_plan(load_recipe(recipe)).decoder
    after = make_plan(load_recipe(recipe, ["config.text_config.rms_norm_eps=0.1"])).decoder
    assert after == replace(before, norm_eps=0.1) != before


def test_a_recipe_changes_configs_of_sub_folders_too(tmp_path):
    recipe = str(write_recipe(tmp_path, ROOT / "assets" / "tiny-vila"))
    before = make_plan(load_recipe(recipe)).decoder
    after = make_plan(load_recipe(recipe, ["config.llm_cfg.rope_theta=77.0"])).decoder
    assert after == replace(before, rope_theta=77.0) != before
    model = shutil.copytree(ROOT / "assets" / "tiny-vila", tmp_path / "model")
    given = json.loads((model / "llm" / "config.json").read_text())
    (model / "llm" / "config.json").unlink()
    whole = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(whole | {"llm_cfg": None}))
    assert plan_refusal(tmp_path, model) == f"{model} has no llm/config.json"
    recipe = str(write_recipe(tmp_path, model, config={"llm_cfg": given}))
    assert make_plan(load_recipe(recipe)).decoder == before


def test_a_float32_model_goes_to_no_reader_that_wants_16_bit(tmp_path):
    def to_float32(tensors):
        tensors |= {name: tensor.float() for name, tensor in tensors.items()}

    model = damage(copy_model(tmp_path / "model"), to_float32)
    words = ["quantize.format=int4_wo", "export.targets=[compressed_tensors]"]
    said = (
        "readers of compressed_tensors take int4_wo in 16 bit, and this model is float32; "
        "set export.dtype=bfloat16 or float16"
    )
    assert plan_refusal(tmp_path, model, *words) == said
    make_plan(load_recipe(str(tmp_path / "recipe.yaml"), [*words, "export.dtype=bfloat16"]))


def test_norms_of_another_dtype_do_not_decide_for_the_weights(tmp_path):
    def norms(tensors):
        tensors |= {key: one.float() for key, one in tensors.items() if "norm" in key}

    model = damage(copy_model(tmp_path / "model"), norms)
    assert make_plan(load_recipe(str(write_recipe(tmp_path, model)))).dtype == "bfloat16"


def test_what_is_written_says_the_dtype_that_it_is_in(tmp_path):
    made = make_plan(load_recipe(str(write_recipe(tmp_path)), ["export.dtype=float16"]))
    text = json.dumps(made.export_config)
    assert '"bfloat16"' in json.dumps(made.config) and '"bfloat16"' not in text
    assert made.config.keys() == made.export_config.keys() and '"float16"' in text
