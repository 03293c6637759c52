"""Ranks of test_family_line: random models through the line, and asked in their forms."""

import sys
from pathlib import Path

from models import each_layout

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.formats import TARGETS as EVERY
from nemo_vlm_ptq.planning.plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.stages import run_stages
from nemo_vlm_ptq.stages.logits import write_logits

STAGES = ("import", "observe", "solve", "export", "verify")
TARGETS = tuple(name for name in EVERY if name != "nemo")  # that is llava's alone
FORMS = ("hf_source", "megatron", "quantized", *TARGETS)


def job(own, home, formats, kv_cache="none"):
    """A model folder's job: in bfloat16, for two inference ranks; a work folder a KV cache."""
    recipe = Recipe(
        model=str(home / "model"),
        workdir=str(home / ("work" if kv_cache == "none" else kv_cache)),
        parallel=vars(own.layout),
        quantize={"format": formats, "kv_cache": kv_cache},
        calibration={"data": "scenes", "samples": 8, "micro_batch": 2},
        export={"targets": TARGETS, "tensor": 2, "dtype": "bfloat16"},
    )
    return RunContext(make_plan(recipe), own)


def main():
    """HOME, with a folder for each family: model/ and inputs.safetensors."""
    for own in each_layout([(2, 1, 1)]):
        for home in sorted(Path(sys.argv[1]).iterdir()):
            run_stages(job(own, home, tuple(FORMATS)), STAGES)
            ask(own, home)
            run_stages(job(own, home, ("nvfp4",), "fp8"), STAGES)


def ask(own, home):
    """The model's logits in each of its forms."""
    inputs = str(home / "inputs.safetensors")
    for form in FORMS:
        output = str(home / f"{form}.safetensors")
        options = {"from": form, "inputs": inputs, "output": output}
        write_logits(job(own, home, ("fp8",)), options)
