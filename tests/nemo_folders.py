"""A work folder with NeMo checkpoints, and what plan says of models: for tests of both ways."""

import models
import pytest

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.planning.plan import make_plan
from nemo_vlm_ptq.recipe import Recipe

NAMES = [name for name, row in FORMATS.items() if "nemo" in row.targets]
FC1 = "module.language_model.decoder.layers.1.mlp.linear_fc1"


def job(own, workdir, names=("fp8",), model=models.TINY_LLAVA, targets=("nemo",), **quantize):
    recipe = Recipe(
        model=str(model),
        workdir=str(workdir),
        parallel=vars(own.layout),
        quantize={"format": names} | quantize,
        calibration={"data": "scenes", "samples": 8, "micro_batch": 8},
        export={"targets": targets},
    )
    return RunContext(make_plan(recipe), own)


def refusal(model, **changes):
    with pytest.raises(UserError) as caught:
        make_plan(Recipe(model=str(model), workdir="nowhere", **changes))
    said = str(caught.value)
    assert "\n" not in said
    return said
