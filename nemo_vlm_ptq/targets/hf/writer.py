"""Write unified Hugging Face checkpoints as modelopt 0.47 names them; nf4 as bitsandbytes does."""

from __future__ import annotations

from typing import Any

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.formats import KV_CACHES, QuantFormat
from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.targets.hf import nf4
from nemo_vlm_ptq.targets.hf.config import config_files, quantization_block
from nemo_vlm_ptq.targets.hf.tensors import kv_tensors, linear_tensors
from nemo_vlm_ptq.targets.writing.published import PublishedFormat, unquantized_weights


def _describe(context: RunContext, fmt: QuantFormat, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return config.json and hf_quant_config.json; for nf4 config.json alone."""
    plan, home = context.plan, context.plan.family.decoder_subfolder
    config = plan.family.decoder_config(plan.export_config)
    if fmt.weight == "nf4":
        beside = [name for name in plan.vision_names if name.rpartition("/")[0] == home]
        block = nf4.quantization_config(plan.dtype, beside, _unquantized_modules(plan))
        return {"config.json": config | {"quantization_config": block}}
    plain, _ = unquantized_weights(context, names)
    excluded = [name.removesuffix(".weight") for name in plain]
    quantize = plan.recipe.quantize
    kv = KV_CACHES.get(quantize.kv_cache)
    return config_files(config, quantization_block(fmt, quantize.group_size, excluded, kv))


def _unquantized_modules(plan: Plan) -> list[str]:
    """Return the linears within layers that stay in 16 bit, as MODULE.LINEAR."""
    entries = [entry for entry in plan.parameter_map if entry.per_layer and not entry.is_linear]
    names = [name for name, shape in plan.decoder.shapes(tuple(entries)).items() if len(shape) == 2]
    return sorted({".".join(name.split(".")[-3:-1]) for name in names})


PUBLISHED = PublishedFormat(
    linear_tensors=linear_tensors, kv_tensors=kv_tensors, describe=_describe
)
