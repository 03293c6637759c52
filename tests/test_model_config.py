"""A model's config with values of the recipe, and the dtype of the plan and of the export."""

import json
import shutil
from dataclasses import replace

from bad_models import ROOT, copy_model, damage, plan_error, write_recipe

from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe

TINY_VILA = ROOT / "assets" / "tiny-vila"


def test_a_recipe_replaces_single_values_of_a_nested_config(tmp_path):
    recipe = str(write_recipe(tmp_path))
    before = make_plan(load_recipe(recipe)).decoder
    after = make_plan(load_recipe(recipe, ["config.text_config.rms_norm_eps=0.1"])).decoder
    assert after == replace(before, norm_eps=0.1) != before


def test_a_recipe_replaces_or_provides_the_config_of_a_sub_folder(tmp_path):
    recipe = str(write_recipe(tmp_path, TINY_VILA))
    before = make_plan(load_recipe(recipe)).decoder
    after = make_plan(load_recipe(recipe, ["config.llm_cfg.rope_theta=77.0"])).decoder
    assert after == replace(before, rope_theta=77.0) != before
    model = shutil.copytree(TINY_VILA, tmp_path / "model")
    llm_config = json.loads((model / "llm" / "config.json").read_text())
    (model / "llm" / "config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"llm_cfg": None}))
    assert plan_error(tmp_path, model) == f"{model} has no llm/config.json"
    recipe = str(write_recipe(tmp_path, model, config={"llm_cfg": llm_config}))
    assert make_plan(load_recipe(recipe)).decoder == before


def test_a_float32_model_is_rejected_for_a_target_that_needs_16_bit(tmp_path):
    def to_float32(tensors):
        tensors |= {name: tensor.float() for name, tensor in tensors.items()}

    model = damage(copy_model(tmp_path / "model"), to_float32)
    overrides = ["quantize.format=int4_wo", "export.targets=[compressed_tensors]"]
    expected = (
        "compressed_tensors stores int4_wo in 16 bit models only, and this model is float32; "
        "set export.dtype=bfloat16 or float16"
    )
    assert plan_error(tmp_path, model, *overrides) == expected
    recipe = str(tmp_path / "recipe.yaml")
    make_plan(load_recipe(recipe, [*overrides, "export.dtype=bfloat16"]))


def test_the_dtype_is_that_of_most_elements_not_of_the_norms(tmp_path):
    def norms_to_float32(tensors):
        tensors |= {name: tensor.float() for name, tensor in tensors.items() if "norm" in name}

    model = damage(copy_model(tmp_path / "model"), norms_to_float32)
    assert make_plan(load_recipe(str(write_recipe(tmp_path, model)))).dtype == "bfloat16"


def test_the_exported_config_states_the_exported_dtype(tmp_path):
    plan = make_plan(load_recipe(str(write_recipe(tmp_path)), ["export.dtype=float16"]))
    exported = json.dumps(plan.export_config)
    assert '"bfloat16"' in json.dumps(plan.config) and '"bfloat16"' not in exported
    assert plan.config.keys() == plan.export_config.keys() and '"float16"' in exported
