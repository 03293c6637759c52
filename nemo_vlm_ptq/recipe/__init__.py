"""The recipe: one YAML file, one frozen record, the only input of every stage."""

from nemo_vlm_ptq.recipe.loading import (
    load_recipe,
    make_recipe,
    recipe_file,
    recipe_keys,
    shipped_recipes,
)
from nemo_vlm_ptq.recipe.schema import Calibration, Parallel, Recipe

__all__ = [
    "Calibration",
    "Parallel",
    "Recipe",
    "load_recipe",
    "make_recipe",
    "recipe_file",
    "recipe_keys",
    "shipped_recipes",
]
