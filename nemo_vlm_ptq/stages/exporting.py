"""export: a quantized Megatron model becomes what others read, every rank writing its files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from nemo_vlm_ptq import store
from nemo_vlm_ptq.export import trtllm
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.job import Job, Written, run_stage
from nemo_vlm_ptq.parallel import deal
from nemo_vlm_ptq.progress import progress_bar
from nemo_vlm_ptq.stages.importing import VISION
from nemo_vlm_ptq.stages.nemo_form import write_nemo
from nemo_vlm_ptq.stages.publishing import copy_new, write_published
from nemo_vlm_ptq.stages.streaming import Stream


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
    plan, session = job.plan, job.session
    T, P = plan.recipe.export.tensor, plan.recipe.export.pipeline
    architecture = plan.family.trtllm_architecture
    files = []
    for name in ("llm", "vision"):
        (folder / name).mkdir(exist_ok=True)
    mine = deal([(p, t) for p in range(P) for t in range(T)], session.layout.world, session.rank)
    stream = Stream(job, fmt)
    for p in sorted({p for p, _ in mine}):
        shards = {t: {} for q, t in mine if q == p}  # type: ignore[var-annotated]
        layers = list(trtllm.layers_of(plan.decoder, p, P))
        label = f"export {fmt.name} trtllm"
        for local, index in enumerate(progress_bar(label, "layer", session.rank, layers)):
            layer, kv = stream.layer(index), stream.kv(index)
            for t, tensors in shards.items():
                own = trtllm.layer_tensors(layer, architecture, plan.decoder, (t, T), job.dtype)
                own |= {} if kv is None else trtllm.kv_tensors(kv)
                start = f"transformer.layers.{local}."
                tensors.update({start + name: value for name, value in own.items()})
        ends = stream.ends()
        for t, tensors in shards.items():
            place = (t, T, p, P)
            tensors.update(trtllm.end_tensors(ends, architecture, plan.decoder, place, job.dtype))
            files.append(f"llm/rank{p * T + t}.safetensors")
            store.save_tensors(tensors, folder / files[-1])
    if session.rank == 0:
        group = plan.recipe.quantize.group_size
        config = trtllm.config(
            architecture, plan.decoder, fmt, group, plan.dtype, (T, P), stream.kv_format
        )
        store.write_json(folder / "llm" / "config.json", config)
        files += ["llm/config.json", *_copy_vision(job, folder / "vision", "vision")]
    return Written(files)


def _copy_vision(job: Job, folder: Path, prefix: str) -> list[str]:
    """Tower and projector with the files that describe and feed them."""
    shutil.copy(job.folder("megatron", VISION), folder / "model.safetensors")
    store.write_json(folder / "config.json", job.plan.config)
    names = ["model.safetensors", "config.json"]
    own = ("config.json", "preprocessor_config.json", "processor_config.json")
    for part in ("", *job.plan.family.parts):
        if part and part == job.plan.family.decoder_part:
            continue
        names += copy_new(job.plan.folder, folder, part, lambda path: path.name in own)
    return [f"{prefix}/{name}" for name in names]
