"""Contexts and errors of plans, for the tests of NeMo 2 checkpoints."""

import models
import pytest

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.targets.registry import TARGETS

FORMAT_NAMES = [name for name in FORMATS if name in TARGETS["nemo"].formats]
FC1 = "module.language_model.decoder.layers.1.mlp.linear_fc1"


def make_context(
    parallel, workdir, names=("fp8",), model=models.TINY_LLAVA, targets=("nemo",), **quantize
):
    recipe = Recipe(
        model=str(model),
        workdir=str(workdir),
        parallel=vars(parallel.layout),
        quantize={"format": names} | quantize,
        calibration={"data": "scenes", "samples": 8, "micro_batch": 8},
        export={"targets": targets},
    )
    return RunContext(plan=make_plan(recipe), parallel=parallel)


def error_message(model, **keys):
    """Return the message with which a plan is rejected, a single line."""
    with pytest.raises(UserError) as caught:
        make_plan(Recipe(model=str(model), workdir="nowhere", **keys))
    message = str(caught.value)
    assert "\n" not in message
    return message
