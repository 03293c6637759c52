"""A process of its own: stages one by one, after each of which no model may be in memory.

python models_end.py WORKDIR STAGE ...
"""

import gc
import sys
import weakref

import models

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.planning.plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.stages import import_model as importing
from nemo_vlm_ptq.stages import model_forms as forms
from nemo_vlm_ptq.stages import observe as observing
from nemo_vlm_ptq.stages import run_stages
from nemo_vlm_ptq.targets.megatron import quantized_checkpoint as quantizing

made: list[weakref.ref] = []  # parameters of all models


def living() -> int:
    return sum(one() is not None for one in made)


def watched(real):
    """A build_decoder that remembers parameters, and finds none of an earlier model alive."""

    def build(*args, **options):
        assert not living(), "another model was in memory when one was made"
        model = real(*args, **options)
        made.extend(weakref.ref(parameter) for parameter in model.parameters())
        return model

    return build


def main() -> None:
    workdir, *stages = sys.argv[1:]
    for module in (importing, observing, quantizing, forms):
        module.build_decoder = watched(module.build_decoder)
    recipe = Recipe(
        model=str(models.TINY_LLAVA),
        workdir=workdir,
        quantize={"format": ("fp8", "int4_awq"), "kv_cache": "fp8"},
        calibration={"data": "scenes", "samples": 4, "micro_batch": 2},
        export={"targets": ("trtllm",)},
    )
    gc.disable()  # Python's own comes whenever it comes
    with models.alone() as own:
        for stage in stages:
            run_stages(RunContext(make_plan(recipe), own), (stage,))
            assert not living(), f"a model outlived {stage}"
    assert made, "no stage made a model"


if __name__ == "__main__":
    main()
