"""export: a quantized Megatron model becomes what others read, every rank writing its files."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq import store
from nemo_vlm_ptq.ahead import made_ahead
from nemo_vlm_ptq.export import trtllm
from nemo_vlm_ptq.formats import KV_CACHES, QuantFormat
from nemo_vlm_ptq.job import Job, Written, run_stage
from nemo_vlm_ptq.parallel import deal
from nemo_vlm_ptq.progress import progress_bar
from nemo_vlm_ptq.stages.importing import VISION
from nemo_vlm_ptq.stages.nemo_form import write_nemo
from nemo_vlm_ptq.stages.publishing import copy_new, write_published
from nemo_vlm_ptq.stages.streaming import AHEAD, Stream
from nemo_vlm_ptq.tensor_file import Add, tensor_file


def export(job: Job) -> None:
    """Write every requested target of every format."""
    for fmt in job.plan.formats:
        quantized = job.folder(fmt.name, "quantized")
        store.need_manifest(quantized, "solve")
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


def _write(job: Job, fmt: QuantFormat, target: str, folder: Path) -> Written:
    if target == "trtllm":
        return _write_trtllm(job, fmt, folder)
    if target == "nemo":
        return write_nemo(job, fmt, folder)
    return write_published(job, fmt, target, folder)


def _write_trtllm(job: Job, fmt: QuantFormat, folder: Path) -> Written:
    """llm/ with one file per inference rank, vision/ with what its engine is built from."""
    for name in ("llm", "vision"):
        (folder / name).mkdir(exist_ok=True)
    if job.session.rank:
        return Written(_write_ranks(job, fmt, folder))
    with ThreadPoolExecutor(1) as beside:
        vision = beside.submit(_copy_vision, job, folder / "vision", "vision")
        files = _write_ranks(job, fmt, folder)
        return Written([*files, *_write_config(job, fmt, folder), *vision.result()])


def _write_config(job: Job, fmt: QuantFormat, folder: Path) -> list[str]:
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


def _write_ranks(job: Job, fmt: QuantFormat, folder: Path) -> list[str]:
    """Files of the inference ranks that this rank deals with, written layer by layer."""
    plan, session = job.plan, job.session
    T, P = plan.recipe.export.tensor, plan.recipe.export.pipeline
    mine = deal([(p, t) for p in range(P) for t in range(T)], session.layout.world, session.rank)
    stream, names = Stream(job, fmt), []
    for p in sorted({p for p, _ in mine}):
        shards = {t: f"llm/rank{p * T + t}.safetensors" for q, t in mine if q == p}
        names += list(shards.values())
        layers = trtllm.layers_of(plan.decoder, p, P)
        parts = [(index, t) for index in layers for t in shards]
        made = made_ahead(parts, lambda part: _layer(job, stream, part[0], (part[1], T)), AHEAD)
        bar = progress_bar(f"export {fmt.name} trtllm", "layer", session.rank, len(parts))
        with bar, ExitStack() as opened:
            add: dict[int, Add] = {}
            for t, name in shards.items():  # what needs no work is written while the first is made
                count = trtllm.MOST * len(layers) + len(trtllm.ENDS)
                add[t] = opened.enter_context(tensor_file(folder / name, count))
                architecture, ends = plan.family.trtllm_architecture, stream.ends((t, T))
                add[t](trtllm.end_tensors(ends, architecture, (p, P), job.dtype))
            for (index, t), own in made:
                start = f"transformer.layers.{index - layers[0]}."
                add[t]({start + key: value for key, value in own.items()})
                bar.update()
    return names


def _layer(job: Job, stream: Stream, index: int, shard: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Tensors of a layer for one inference rank."""
    layer, kv = stream.layer(index, shard), stream.kv(index)
    tensors = trtllm.layer_tensors(layer, job.plan.family.trtllm_architecture, job.dtype)
    return tensors | ({} if kv is None else trtllm.kv_tensors(kv))


def _copy_vision(job: Job, folder: Path, prefix: str) -> list[str]:
    """Tower and projector with the files that describe and feed them."""
    shutil.copy(job.folder("megatron", VISION), folder / "model.safetensors")
    store.write_json(folder / "config.json", job.plan.written_config)
    names = ["model.safetensors", "config.json"]
    own = ("config.json", "preprocessor_config.json", "processor_config.json")
    for part in ("", *job.plan.family.parts):
        if part and part == job.plan.family.decoder_part:
            continue
        names += copy_new(job.plan.folder, folder, part, lambda path: path.name in own)
    return [f"{prefix}/{name}" for name in names]
