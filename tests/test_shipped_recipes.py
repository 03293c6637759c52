"""Recipes of published models: each one plans, and is what its script writes."""

import make_recipes
import pytest
import yaml
from bad_models import ROOT
from test_full_size import hollow_folder

from nemo_vlm_ptq.data.questions import calibration_questions
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.planning.forecast import describe_plan
from nemo_vlm_ptq.planning.plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe, shipped_recipes

WRITTEN = make_recipes.recipes()
NAMES = [(model, fmt) for model in make_recipes.MODELS for fmt in FORMATS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Hub id -> a folder like the published one, whose weights take no disk."""
    home = tmp_path_factory.mktemp("published")
    ids = [model for _, model in make_recipes.MODELS.values()]
    return {model: hollow_folder(home, model.split("/")[1]) for model in ids}


def test_the_files_are_what_the_script_writes():
    for name, text in WRITTEN.items():
        assert (ROOT / "configs" / name).read_text() == text, "run python tests/make_recipes.py"


def test_no_file_of_a_model_or_format_is_left_that_the_script_no_longer_writes():
    own = {name for name in shipped_recipes() if name.startswith(tuple(make_recipes.MODELS))}
    assert own - {name.removesuffix(".yaml") for name in WRITTEN} == {"llava15_7b"}


@pytest.mark.parametrize(("model", "fmt"), NAMES)
def test_a_recipe_loads_by_name_and_plans_for_a_model_of_its_size(folders, model, fmt):
    name = f"{model}_{fmt}"
    recipe = load_recipe(name)
    assert (recipe.quantize.format, recipe.workdir) == ((fmt,), f"work/{name}")
    folder = folders[recipe.model]
    plan = make_plan(load_recipe(name, [f"model={folder}", "parallel.tensor=1"]))
    assert len(calibration_questions(recipe.calibration).items) == recipe.calibration.samples
    (row,) = plan.formats
    assert plan.targets(row) == list(plan.recipe.export.targets) != []
    assert fmt in describe_plan(plan)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_recipe_is_short_and_says_itself_what_one_may_want_to_change(name):
    lines = WRITTEN[name].splitlines()
    assert len(lines) <= 12 and max(map(len, lines)) <= 120
    said = yaml.safe_load(WRITTEN[name])
    assert set(said) == {"model", "workdir", "quantize", "calibration", "export", "evaluate"}
