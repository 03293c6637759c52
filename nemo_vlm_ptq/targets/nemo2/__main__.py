"""The imported 16 bit model as a NeMo checkpoint: WORKDIR/nemo, out of WORKDIR/megatron.

    python -m nemo_vlm_ptq.nemo.checkpoint RECIPE [key=value ...]

Alone, or on ranks that torchrun started.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_vlm_ptq.errors import UserError


def write_checkpoint(recipe_name: str, overrides: Sequence[str]) -> None:
    """WORKDIR/nemo; the recipe's model is imported first, unless it is already.

    Raises:
        UserError: the recipe cannot run, or its model has no class in NeMo.
    """
    from nemo_vlm_ptq.context import RunContext, run_stage
    from nemo_vlm_ptq.megatron.parallel_context import parallel_context
    from nemo_vlm_ptq.planning.plan import make_plan
    from nemo_vlm_ptq.recipe import load_recipe
    from nemo_vlm_ptq.stages.import_model import import_model
    from nemo_vlm_ptq.targets.nemo2.writer import write_nemo
    from nemo_vlm_ptq.workdir import store

    words = ["export.targets=[nemo]", "quantize.format=fp8", "quantize.kv_cache=none"]
    plan = make_plan(load_recipe(recipe_name, [*overrides, *words]))
    with parallel_context(
        {"tensor": 1, "pipeline": 1, "data": "auto"}
    ) as own:  # any layout writes the same
        job, target = RunContext(plan, own), Path(plan.recipe.workdir) / "nemo"
        import_model(job)
        megatron = store.hash_manifest(job.folder("megatron"))
        settings = {"format": "16 bit", "input": megatron, "dtype": plan.dtype}
        run_stage(job, "nemo", target, settings, lambda: write_nemo(job, None, target))


def main() -> int:
    """Exit code: 0 done, 2 the user can fix it."""
    words = sys.argv[1:]
    try:
        if not words:
            raise UserError("name a recipe: python -m nemo_vlm_ptq.nemo.checkpoint RECIPE")
        write_checkpoint(words[0], words[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
