"""Quantize the Megatron model in memory, write it as a checkpoint, and load that in any layout.

modelopt is imported late because the import takes seconds, and in functions that hold no model:
pulp, which modelopt imports, stores ImportErrors, whose tracebacks keep the frames of the importing
functions, and thus a model, alive.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from nemo_vlm_ptq.calibrate.solve.layer import load_kv_amax, load_scales
from nemo_vlm_ptq.calibrate.solve.linear_scales import LinearScales, shard_scales
from nemo_vlm_ptq.checkpoints.torch_dist_index import INDEX
from nemo_vlm_ptq.context import RunContext, StageOutput
from nemo_vlm_ptq.formats import KV_CACHES, QuantFormat
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import (
    layer_indices,
    load_from_source,
    load_model,
    normalize_index,
    save_model,
    written_layers,
)
from nemo_vlm_ptq.sources.decoder_weights import open_weights
from nemo_vlm_ptq.workdir.files import rank_files

if TYPE_CHECKING:
    from nemo_vlm_ptq.targets.megatron.quantizers import KvAmaxLookup, ScalesLookup


def write(context: RunContext, fmt: QuantFormat, folder: Path) -> StageOutput:
    """Write weights, quantizers and modelopt state as a modelopt Megatron checkpoint."""
    from nemo_vlm_ptq.targets.megatron import quantizers

    _write(context, fmt, folder, quantizers)
    files = rank_files(folder, context.parallel.rank)
    if context.parallel.rank == 0:
        for index in (folder / "modelopt_state").rglob(INDEX):  # none without quantizers
            normalize_index(index.parent)
        state = sorted((folder / "modelopt_state").rglob("*"))
        files += [str(path.relative_to(folder)) for path in state if path.is_file()]
    return StageOutput(files=files)


def _write(context: RunContext, fmt: QuantFormat, folder: Path, quantizers: ModuleType) -> None:
    model = build_decoder(context.plan.decoder, context.parallel, context.dtype)
    _quantize(context, fmt, model, quantizers, written_only=True)
    save_model(model, folder)
    quantizers.save_modelopt_state(model, folder)


def _quantize(
    context: RunContext,
    fmt: QuantFormat,
    model: Any,
    quantizers: ModuleType,
    *,
    written_only: bool = False,
) -> None:
    """Fill a model from the source and quantize it with the solved scales, in memory."""
    plan, parallel = context.plan, context.parallel
    get_scales, get_kv_amax = scales_lookup(context, fmt), kv_amax_lookup(context, fmt)
    with open_weights(plan, parallel.device) as weights:
        load_from_source(model, parallel, weights, written_only=written_only)
    kv_cache = KV_CACHES.get(plan.recipe.quantize.kv_cache)
    quantizers.insert_quantizers(model, fmt, plan.recipe.quantize.group_size, kv_cache)
    layers = written_layers(model) if written_only else layer_indices(model)
    quantizers.prepare_weights(model, fmt, get_scales, layers)
    quantizers.fill_quantizers(model, fmt, get_scales, get_kv_amax)


def build_quantized(context: RunContext, fmt: QuantFormat, window: range) -> Any:
    """Build a window of the quantized model in memory, from source and scales."""
    from nemo_vlm_ptq.targets.megatron import quantizers

    return _build(context, fmt, window, quantizers)


def _build(context: RunContext, fmt: QuantFormat, window: range, quantizers: ModuleType) -> Any:
    plan, parallel = context.plan, context.parallel
    model = build_decoder(plan.decoder, parallel, context.dtype, window=window)
    _quantize(context, fmt, model, quantizers)
    quantizers.use_custom_backends(model, fmt)
    return model


def load_quantized(context: RunContext, fmt: QuantFormat) -> Any:
    """Load the quantized model in the layout of this run.

    Scales are read from the layout-independent files of solve: modelopt 0.47 restores block scales
    incorrectly if the tensor-parallel size has changed.
    """
    from nemo_vlm_ptq.targets.megatron import quantizers

    return _load(context, fmt, quantizers)


def _load(context: RunContext, fmt: QuantFormat, quantizers: ModuleType) -> Any:
    get_scales, get_kv_amax = scales_lookup(context, fmt), kv_amax_lookup(context, fmt)
    options = context.plan.recipe.quantize
    model = build_decoder(context.plan.decoder, context.parallel, context.dtype)
    kv_cache = KV_CACHES.get(options.kv_cache)
    quantizers.insert_quantizers(model, fmt, options.group_size, kv_cache)
    quantizers.fill_quantizers(model, fmt, get_scales, get_kv_amax)
    load_model(model, context.folder(fmt.name, "quantized"))
    quantizers.use_custom_backends(model, fmt)
    return model


def disable_activation_rounding(model: Any) -> None:
    """Disable the quantizers of activations and KV cache, but not those of weights."""
    from nemo_vlm_ptq.targets.megatron import quantizers

    quantizers.disable_activation_quantizers(model)


def scales_lookup(context: RunContext, fmt: QuantFormat) -> ScalesLookup:
    """Return a lookup (layer, linear) -> solved scales of this rank's shard."""
    parallel, folder = context.parallel, context.folder(fmt.name, "scales")
    layers: dict[int, dict[str, LinearScales]] = {}

    def get_scales(layer: int, linear: str) -> LinearScales:
        if layer not in layers:
            layers[layer] = load_scales(folder, layer)
        return shard_scales(
            layers[layer][linear], linear, parallel.tensor_rank, parallel.layout.tensor
        )

    return get_scales


def kv_amax_lookup(context: RunContext, fmt: QuantFormat) -> KvAmaxLookup | None:
    """Return a lookup layer -> amax [] of keys and of values; None for a 16 bit KV cache."""
    if context.plan.recipe.quantize.kv_cache == "none":
        return None

    def get_kv_amax(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return load_kv_amax(context.folder(fmt.name, "scales"), layer)

    return get_kv_amax
