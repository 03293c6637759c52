"""The quantized Megatron model: written after solve, and loaded again in any layout.

modelopt is imported late, since it takes seconds, and by functions that hold no model: pulp, which
it imports, keeps what it could not import as exceptions, and with them the frames of its importers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from nemo_vlm_ptq.calibrate.solve.layer import load_kv, load_scales
from nemo_vlm_ptq.calibrate.solve.scales import LinearScales, shard_scales
from nemo_vlm_ptq.checkpoints.torch_dist_index import INDEX
from nemo_vlm_ptq.context import RunContext, StageOutput, run_stage
from nemo_vlm_ptq.formats import KV_CACHES, QuantFormat
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import load_model, normalize_index, save_model, written_layers
from nemo_vlm_ptq.stages.import_model import rank_files
from nemo_vlm_ptq.workdir import store


def write_quantized(job: RunContext, fmt: QuantFormat) -> None:
    """An ordinary modelopt-quantized Megatron checkpoint: its quantizers, its state."""
    parallel, folder = job.parallel, job.folder(fmt.name, "quantized")
    settings = {
        "scales": store.hash_manifest(job.folder(fmt.name, "scales")),
        "kv_cache": job.plan.recipe.quantize.kv_cache,
    }

    def body() -> StageOutput:
        from nemo_vlm_ptq.targets.megatron import quantizers

        _write(job, fmt, folder, quantizers)
        files = rank_files(folder, parallel.rank)
        if parallel.rank == 0:
            for index in (folder / "modelopt_state").rglob(INDEX):  # nf4 has none
                normalize_index(index.parent)
            state = sorted((folder / "modelopt_state").rglob("*"))
            files += [str(path.relative_to(folder)) for path in state if path.is_file()]
        return StageOutput(files)

    run_stage(job, f"quantize {fmt.name}", folder, settings, body)


def _write(job: RunContext, fmt: QuantFormat, folder: Path, quantizers: ModuleType) -> None:
    scales_of, kv_of = sharded_scales(job, fmt), kv_amax(job, fmt)
    model = build_decoder(job.plan.decoder, job.parallel, job.dtype)
    load_model(model, job.folder("megatron"), to_write=True)
    chosen = job.plan.recipe.quantize
    quantizers.insert_quantizers(model, fmt, chosen.group_size, KV_CACHES.get(chosen.kv_cache))
    quantizers.prepare_weights(model, fmt, scales_of, written_layers(model))
    quantizers.fill_quantizers(model, fmt, scales_of, kv_of)
    save_model(model, folder)
    quantizers.save_modelopt_state(model, folder)


def load_quantized(job: RunContext, fmt: QuantFormat) -> Any:
    """The quantized model of a finished solve, in this run's layout.

    Scales come from the layout-free files: modelopt's own restore of block scales is wrong when
    the tensor-parallel size has changed.
    """
    from nemo_vlm_ptq.targets.megatron import quantizers

    return _load(job, fmt, quantizers)


def _load(job: RunContext, fmt: QuantFormat, quantizers: ModuleType) -> Any:
    scales_of, kv_of = sharded_scales(job, fmt), kv_amax(job, fmt)
    chosen = job.plan.recipe.quantize
    model = build_decoder(job.plan.decoder, job.parallel, job.dtype)
    quantizers.insert_quantizers(model, fmt, chosen.group_size, KV_CACHES.get(chosen.kv_cache))
    quantizers.fill_quantizers(model, fmt, scales_of, kv_of)
    load_model(model, job.folder(fmt.name, "quantized"))
    quantizers.use_own_rounding(model, fmt)
    return model


def disable_activation_rounding(model: Any) -> None:
    """A quantized model rounds weights alone from now on."""
    from nemo_vlm_ptq.targets.megatron import quantizers

    quantizers.disable_activation_quantizers(model)


def sharded_scales(job: RunContext, fmt: QuantFormat) -> Callable[[int, str], LinearScales]:
    """(layer, linear) -> solved scales cut to this rank's shard."""
    parallel, folder = job.parallel, job.folder(fmt.name, "scales")
    layers: dict[int, dict[str, LinearScales]] = {}

    def scales_of(layer: int, linear: str) -> LinearScales:
        if layer not in layers:
            layers[layer] = load_scales(folder, layer)
        return shard_scales(layers[layer][linear], linear, parallel.tensor, parallel.layout.tensor)

    return scales_of


def kv_amax(
    job: RunContext, fmt: QuantFormat
) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]] | None:
    """layer -> largest |key| and |value| []; None if the KV cache stays in 16 bit."""
    if job.plan.recipe.quantize.kv_cache == "none":
        return None
    return lambda layer: load_kv(job.folder(fmt.name, "scales"), layer)
