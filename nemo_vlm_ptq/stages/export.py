"""export: write the requested targets from the quantized Megatron checkpoint."""

from __future__ import annotations

from functools import partial
from typing import Any

from nemo_vlm_ptq.context import RunContext, run_stage
from nemo_vlm_ptq.targets.registry import TARGETS, load_module
from nemo_vlm_ptq.workdir import store


def export(context: RunContext) -> None:
    """Write every requested target of every format."""
    recipe = context.plan.recipe
    for fmt in context.plan.formats:
        quantized = context.folder(fmt.name, "quantized")
        store.require_manifest(quantized, "solve")
        for target in context.plan.targets(fmt):
            settings: dict[str, Any] = {
                "format": fmt.name,
                "input": store.hash_manifest(quantized),
                "dtype": context.plan.dtype,
                "kv_cache": recipe.quantize.kv_cache,
            }
            settings |= {key: getattr(recipe.export, key) for key in TARGETS[target].layout_keys}
            folder = context.folder(fmt.name, target)
            write = partial(load_module(target, "writer").write, context, fmt, folder)
            run_stage(context, f"export {fmt.name} {target}", folder, settings, write)
