"""Rank script of test_family_line: runs all stages on random models and computes logits."""

import sys
from pathlib import Path

from models import parallel_contexts

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.stages import run_stages
from nemo_vlm_ptq.stages.logits import write_logits
from nemo_vlm_ptq.targets.registry import TARGETS as ALL_TARGETS

STAGES = ("import", "observe", "solve", "export", "verify")
SOURCE_FORMS = ("hf_source", "megatron", "quantized")


def targets_of(family):
    """Return the targets of a family; nemo supports llava only."""
    unsupported = {"nemo"} if FAMILIES[family].trtllm_architecture else {"nemo", "trtllm"}
    return tuple(name for name in ALL_TARGETS if name not in unsupported)


def readable(family):
    """Return the targets of a family that the reference model runs."""
    return tuple(name for name in targets_of(family) if ALL_TARGETS[name].has_reader)


def run_context(parallel, home, formats, kv_cache="none"):
    """Return the context of a model folder, with a work folder for each KV cache format."""
    recipe = Recipe(
        model=str(home / "model"),
        workdir=str(home / ("work" if kv_cache == "none" else kv_cache)),
        parallel=vars(parallel.layout),
        quantize={"format": formats, "kv_cache": kv_cache},
        calibration={"data": "scenes", "samples": 8, "micro_batch": 2},
        export={"targets": targets_of(home.name), "tensor": 2, "dtype": "bfloat16"},
    )
    return RunContext(plan=make_plan(recipe), parallel=parallel)


def write_all_logits(parallel, home):
    """Write the logits of each form of a model."""
    for form in (*SOURCE_FORMS, *readable(home.name)):
        options = {
            "from": form,
            "inputs": str(home / "inputs.safetensors"),
            "output": str(home / f"{form}.safetensors"),
        }
        write_logits(run_context(parallel, home, ("fp8",)), options)


def main():
    """Arguments: HOME, which has a folder for each family, with model/ and inputs.safetensors."""
    for parallel in parallel_contexts([(2, 1, 1)]):
        for home in sorted(Path(sys.argv[1]).iterdir()):
            run_stages(run_context(parallel, home, tuple(FORMATS)), STAGES)
            write_all_logits(parallel, home)
            run_stages(run_context(parallel, home, ("nvfp4",), "fp8"), STAGES)
