"""Run stages in one process and check that no model is alive after each of them.

python stage_memory.py WORKDIR STAGE ...
"""

import gc
import sys
import weakref
from importlib import import_module

import models

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.stages import run_stages
from nemo_vlm_ptq.targets.megatron import quantized_checkpoint
from nemo_vlm_ptq.verify import model_forms

STAGE_MODULES = ("import_model", "observe")  # modules that call build_decoder
parameters: list[weakref.ref] = []  # of all models built so far


def live_parameters() -> int:
    return sum(reference() is not None for reference in parameters)


def track(build_decoder):
    """Wrap build_decoder to record the parameters, and to reject a second model in memory."""

    def build(*args, **kwargs):
        assert not live_parameters(), "another model is in memory"
        model = build_decoder(*args, **kwargs)
        parameters.extend(weakref.ref(parameter) for parameter in model.parameters())
        return model

    return build


def main() -> None:
    workdir, *stages = sys.argv[1:]
    # The package's attributes of these names are the stage functions.
    stage_modules = [import_module(f"nemo_vlm_ptq.stages.{name}") for name in STAGE_MODULES]
    for module in (*stage_modules, quantized_checkpoint, model_forms):
        module.build_decoder = track(module.build_decoder)
    recipe = Recipe(
        model=str(models.TINY_LLAVA),
        workdir=workdir,
        quantize={"format": ("fp8", "int4_awq"), "kv_cache": "fp8"},
        calibration={"data": "scenes", "samples": 4, "micro_batch": 2},
        export={"targets": ("trtllm", "megatron")},
    )
    gc.disable()  # automatic collection runs at arbitrary times
    with models.single_rank() as parallel:
        for stage in stages:
            run_stages(RunContext(plan=make_plan(recipe), parallel=parallel), (stage,))
            assert not live_parameters(), f"a model is alive after {stage}"
    assert parameters, "no stage built a model"


if __name__ == "__main__":
    main()
