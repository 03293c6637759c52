"""Write the quantized Megatron checkpoint after solve, and load it in any layout.

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
from nemo_vlm_ptq.calibrate.solve.scales import LinearScales, shard_scales
from nemo_vlm_ptq.checkpoints.torch_dist_index import INDEX
from nemo_vlm_ptq.context import RunContext, StageOutput, run_stage
from nemo_vlm_ptq.formats import KV_CACHES, QuantFormat
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import load_model, normalize_index, save_model, written_layers
from nemo_vlm_ptq.workdir import store
from nemo_vlm_ptq.workdir.files import rank_files

if TYPE_CHECKING:
    from nemo_vlm_ptq.targets.megatron.quantizers import KvAmaxLookup, ScalesLookup


def write_quantized(context: RunContext, fmt: QuantFormat) -> None:
    """Write weights, quantizers and modelopt state as a modelopt Megatron checkpoint."""
    parallel, folder = context.parallel, context.folder(fmt.name, "quantized")
    settings = {
        "scales": store.hash_manifest(context.folder(fmt.name, "scales")),
        "kv_cache": context.plan.recipe.quantize.kv_cache,
    }

    def body() -> StageOutput:
        from nemo_vlm_ptq.targets.megatron import quantizers

        _write(context, fmt, folder, quantizers)
        files = rank_files(folder, parallel.rank)
        if parallel.rank == 0:
            for index in (folder / "modelopt_state").rglob(INDEX):  # none without quantizers
                normalize_index(index.parent)
            state = sorted((folder / "modelopt_state").rglob("*"))
            files += [str(path.relative_to(folder)) for path in state if path.is_file()]
        return StageOutput(files=files)

    run_stage(context, f"quantize {fmt.name}", folder, settings, body)


def _write(context: RunContext, fmt: QuantFormat, folder: Path, quantizers: ModuleType) -> None:
    get_scales, get_kv_amax = scales_lookup(context, fmt), kv_amax_lookup(context, fmt)
    model = build_decoder(context.plan.decoder, context.parallel, context.dtype)
    load_model(model, context.folder("megatron"), written_only=True)
    options = context.plan.recipe.quantize
    kv_cache = KV_CACHES.get(options.kv_cache)
    quantizers.insert_quantizers(model, fmt, options.group_size, kv_cache)
    quantizers.prepare_weights(model, fmt, get_scales, written_layers(model))
    quantizers.fill_quantizers(model, fmt, get_scales, get_kv_amax)
    save_model(model, folder)
    quantizers.save_modelopt_state(model, folder)


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
