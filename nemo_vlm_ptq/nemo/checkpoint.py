"""Write the imported 16 bit model as a NeMo 2 checkpoint: WORKDIR/nemo, from WORKDIR/megatron.

    python -m nemo_vlm_ptq.nemo.checkpoint RECIPE [key=value ...]

Runs in one process, or on the ranks that torchrun started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from nemo_vlm_ptq.errors import UserError


def write_checkpoint(recipe_name: str, overrides: Sequence[str]) -> None:
    """Write WORKDIR/nemo; the recipe's model is imported first unless it has been.

    Raises:
        UserError: the recipe cannot run, or NeMo has no class for the model.
    """
    from nemo_vlm_ptq.context import RunContext, run_stage
    from nemo_vlm_ptq.megatron.parallel_context import parallel_context
    from nemo_vlm_ptq.planning.make_plan import make_plan
    from nemo_vlm_ptq.recipe import load_recipe
    from nemo_vlm_ptq.stages.import_model import import_model
    from nemo_vlm_ptq.targets.nemo2.writer import write
    from nemo_vlm_ptq.workdir import store
    from nemo_vlm_ptq.workdir.lock import lock_workdir

    fixed = ["export.targets=[nemo]", "quantize.format=fp8", "quantize.kv_cache=none"]
    plan = make_plan(load_recipe(recipe_name, [*overrides, *fixed]))
    sizes = {"tensor": 1, "pipeline": 1, "data": "auto"}  # every layout writes the same files
    is_first = os.environ.get("RANK", "0") == "0"
    owned = (
        lock_workdir(Path(plan.recipe.workdir), "nemo.checkpoint") if is_first else nullcontext()
    )
    with owned, parallel_context(sizes) as parallel:
        context, target = (
            RunContext(plan=plan, parallel=parallel),
            Path(plan.recipe.workdir) / "nemo",
        )
        import_model(context)
        megatron = store.hash_manifest(context.folder("megatron"))
        settings = {"format": "16 bit", "input": megatron, "dtype": plan.dtype}
        run_stage(context, "nemo", target, settings, lambda: write(context, None, target))


def main() -> int:
    """Return the exit code: 0 done, 2 an error that the user can fix."""
    arguments = sys.argv[1:]
    try:
        if not arguments:
            raise UserError("usage: python -m nemo_vlm_ptq.nemo.checkpoint RECIPE [key=value ...]")
        write_checkpoint(arguments[0], arguments[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
