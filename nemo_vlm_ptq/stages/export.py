"""export: a quantized Megatron model becomes what others read, every rank writing its files."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq.checkpoints.streaming_writer import Add, tensor_file
from nemo_vlm_ptq.context import RunContext, StageOutput, run_stage
from nemo_vlm_ptq.distributed.layout import round_robin
from nemo_vlm_ptq.formats import KV_CACHES, QuantFormat
from nemo_vlm_ptq.stages.import_model import VISION_FILE
from nemo_vlm_ptq.targets.nemo2.writer import write_nemo
from nemo_vlm_ptq.targets.trtllm import tensors as trtllm
from nemo_vlm_ptq.targets.writing.layer_encoder import PREFETCH_LAYERS, LayerEncoder
from nemo_vlm_ptq.targets.writing.published import copy_missing, write_published
from nemo_vlm_ptq.utils.prefetch import prefetch
from nemo_vlm_ptq.utils.progress import progress_bar
from nemo_vlm_ptq.workdir import store


def export(job: RunContext) -> None:
    """Write every requested target of every format."""
    for fmt in job.plan.formats:
        quantized = job.folder(fmt.name, "quantized")
        store.require_manifest(quantized, "solve")
        for target in job.plan.targets(fmt):
            settings: dict[str, Any] = {
                "format": fmt.name,
                "input": store.hash_manifest(quantized),
                "dtype": job.plan.dtype,
                "kv_cache": job.plan.recipe.quantize.kv_cache,
            }
            if target == "trtllm":
                chosen = job.plan.recipe.export
                settings |= {"tensor": chosen.tensor, "pipeline": chosen.pipeline}
            folder = job.folder(fmt.name, target)
            run_stage(
                job,
                f"export {fmt.name} {target}",
                folder,
                settings,
                lambda fmt=fmt, target=target, folder=folder: _write(job, fmt, target, folder),  # type: ignore[misc]
            )


def _write(job: RunContext, fmt: QuantFormat, target: str, folder: Path) -> StageOutput:
    if target == "trtllm":
        return _write_trtllm(job, fmt, folder)
    if target == "nemo":
        return write_nemo(job, fmt, folder)
    return write_published(job, fmt, target, folder)


def _write_trtllm(job: RunContext, fmt: QuantFormat, folder: Path) -> StageOutput:
    """llm/ with one file per inference rank, vision/ with what its engine is built from."""
    for name in ("llm", "vision"):
        (folder / name).mkdir(exist_ok=True)
    if job.parallel.rank:
        return StageOutput(_write_ranks(job, fmt, folder))
    with ThreadPoolExecutor(1) as beside:
        vision = beside.submit(_copy_vision, job, folder / "vision", "vision")
        files = _write_ranks(job, fmt, folder)
        return StageOutput([*files, *_write_config(job, fmt, folder), *vision.result()])


def _write_config(job: RunContext, fmt: QuantFormat, folder: Path) -> list[str]:
    plan = job.plan
    chosen, quantize = plan.recipe.export, plan.recipe.quantize
    config = trtllm.config(
        plan.family.trtllm_architecture,
        plan.decoder,
        fmt,
        quantize.group_size,
        plan.dtype,
        (chosen.tensor, chosen.pipeline),
        KV_CACHES.get(quantize.kv_cache),
    )
    store.write_json(folder / "llm" / "config.json", config)
    return ["llm/config.json"]


def _write_ranks(job: RunContext, fmt: QuantFormat, folder: Path) -> list[str]:
    """Files of the inference ranks that this rank deals with, written layer by layer."""
    plan, parallel = job.plan, job.parallel
    T, P = plan.recipe.export.tensor, plan.recipe.export.pipeline
    mine = round_robin(
        [(p, t) for p in range(P) for t in range(T)], parallel.layout.world, parallel.rank
    )
    stream, names = LayerEncoder(job, fmt), []
    for p in sorted({p for p, _ in mine}):
        shards = {t: f"llm/rank{p * T + t}.safetensors" for q, t in mine if q == p}
        names += list(shards.values())
        layers = trtllm.layers_of(plan.decoder, p, P)
        parts = [(index, t) for index in layers for t in shards]
        made = prefetch(
            parts, lambda part: _layer(job, stream, part[0], (part[1], T)), PREFETCH_LAYERS
        )
        bar = progress_bar(f"export {fmt.name} trtllm", "layer", parallel.rank, len(parts))
        with bar, ExitStack() as opened:
            add: dict[int, Add] = {}
            for t, name in shards.items():  # what needs no work is written while the first is made
                count = trtllm.MAX_LAYER_TENSORS * len(layers) + len(trtllm.ENDS)
                add[t] = opened.enter_context(tensor_file(folder / name, count))
                architecture, ends = plan.family.trtllm_architecture, stream.ends((t, T))
                add[t](trtllm.end_tensors(ends, architecture, (p, P), job.dtype))
            for (index, t), own in made:
                start = f"transformer.layers.{index - layers[0]}."
                add[t]({start + key: value for key, value in own.items()})
                bar.update()
    return names


def _layer(
    job: RunContext, stream: LayerEncoder, index: int, shard: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Tensors of a layer for one inference rank."""
    layer, kv = stream.layer(index, shard), stream.kv(index)
    tensors = trtllm.layer_tensors(layer, job.plan.family.trtllm_architecture, job.dtype)
    return tensors | ({} if kv is None else trtllm.kv_tensors(kv))


def _copy_vision(job: RunContext, folder: Path, prefix: str) -> list[str]:
    """Tower and projector with the files that describe and feed them."""
    shutil.copy(job.folder("megatron", VISION_FILE), folder / "model.safetensors")
    store.write_json(folder / "config.json", job.plan.export_config)
    names = ["model.safetensors", "config.json"]
    own = ("config.json", "preprocessor_config.json", "processor_config.json")
    for part in ("", *job.plan.family.subfolders):
        if part and part == job.plan.family.decoder_subfolder:
            continue
        names += copy_missing(job.plan.folder, folder, part, lambda path: path.name in own)
    return [f"{prefix}/{name}" for name in names]
