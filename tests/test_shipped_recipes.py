"""Recipes in configs/: one per published model; the format is an override."""

import pytest
import yaml
from bad_models import ROOT
from test_full_size import write_sparse_model

from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.planning.describe import describe_plan
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe, shipped_recipes
from nemo_vlm_ptq.recipe.loading import FORMER_MODELS
from nemo_vlm_ptq.targets.registry import supported_targets

MODELS = [name for name in shipped_recipes() if not name.startswith("quickstart")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Hub id -> a folder like the published one, whose weights take no disk space."""
    home = tmp_path_factory.mktemp("published")
    ids = [load_recipe(name).model for name in MODELS]
    return {model: write_sparse_model(home, model.split("/")[1]) for model in ids}


def test_configs_holds_one_recipe_per_model():
    ids = [load_recipe(name).model for name in MODELS]
    assert len(set(ids)) == len(ids) >= 11 and len(shipped_recipes()) <= 20


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_plans_in_every_format_for_a_model_of_its_size(folders, name, fmt):
    target = next(one for one in supported_targets(FORMATS[fmt]) if one != "trtllm")
    model = f"model={folders[load_recipe(name).model]}"
    words = [model, "parallel.tensor=1", f"quantize.format={fmt}", f"export.targets=[{target}]"]
    plan = make_plan(load_recipe(name, words))
    assert [row.name for row in plan.formats] == [fmt]
    assert plan.targets(FORMATS[fmt]) == [target]
    assert fmt in describe_plan(plan, 80 * 10**9, 1)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", FORMER_MODELS)
def test_a_former_name_still_plans_with_one_line(folders, capsys, monkeypatch, name, fmt):
    monkeypatch.delenv("RANK", raising=False)
    model = f"model={folders[load_recipe(name).model]}"
    plan = make_plan(load_recipe(f"{name}_{fmt}", [model, "parallel.tensor=1"]))
    assert (plan.recipe.quantize.format, plan.recipe.workdir) == ((fmt,), f"work/{name}_{fmt}")
    targets = [one for one in ("trtllm", "hf") if one in supported_targets(FORMATS[fmt])]
    assert plan.targets(FORMATS[fmt]) == list(plan.recipe.export.targets) == targets
    words = f"{name} quantize.format={fmt} export.targets=[{','.join(targets)}]"
    line = f"recipe {name}_{fmt} is deprecated: use {words}"
    assert capsys.readouterr() == ("", f"nemo-vlm-ptq: {line}\n")


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_is_short_and_calibrates_and_scores_on_real_data(name):
    text = shipped_recipes()[name].read_text()
    lines = text.splitlines()
    assert len(lines) <= 12 and max(map(len, lines)) <= 120
    keys = yaml.safe_load(text)
    assert set(keys) == {"model", "workdir", "quantize", "calibration", "export", "evaluate"}
    assert not {"scenes", "hard_scenes"} & {keys["calibration"]["data"], keys["evaluate"]["data"]}
    assert (ROOT / "configs" / f"{name}.yaml") == shipped_recipes()[name]
