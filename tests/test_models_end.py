"""No model outlives the stage that made it, though modelopt's modules hold themselves.

Left to Python, quantized models of several formats were in memory at a time.
"""

import gc
import weakref
from contextlib import contextmanager

import models
import pytest

from nemo_vlm_ptq.job import Job
from nemo_vlm_ptq.plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.stages import forms, importing, observing, quantizing, run_stages

MAKERS = (importing, observing, quantizing, forms)


@contextmanager
def no_garbage_collection():
    """Of Python's own: it comes whenever it comes."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_each_stage_ends_without_its_model(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref] = []
    before: list[int] = []  # parameters of earlier models when one is made

    def living() -> int:
        return sum(one() is not None for one in made)

    def counting(real):
        def build(*args, **options):
            before.append(living())
            model = real(*args, **options)
            made.extend(weakref.ref(parameter) for parameter in model.parameters())
            return model

        return build

    for module in MAKERS:
        monkeypatch.setattr(module, "build_decoder", counting(module.build_decoder))
    recipe = Recipe(
        model=str(models.TINY_LLAVA),
        workdir=str(tmp_path),
        quantize={"format": ("fp8", "int4_awq"), "kv_cache": "fp8"},
        calibration={"data": "scenes", "samples": 4, "micro_batch": 2},
        export={"targets": ("trtllm",)},
    )
    with models.alone() as own, no_garbage_collection():
        for stage in ("import", "observe", "solve", "export", "verify"):
            run_stages(Job(make_plan(recipe), own), (stage,))
            assert not living(), stage
    assert len(before) == 1 + 1 + 2 + 2 * 3 and not any(before)
