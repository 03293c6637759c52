"""export: a quantized Megatron model becomes what others read, every rank writing its files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq import store
from nemo_vlm_ptq.calibrate.solve import load_scales
from nemo_vlm_ptq.export import hf, trtllm
from nemo_vlm_ptq.export.stream import Layer, stream_ends, stream_layer
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.job import Job, Written, run_stage
from nemo_vlm_ptq.megatron.checkpoint import LayerReader
from nemo_vlm_ptq.parallel import deal, split_evenly
from nemo_vlm_ptq.progress import progress_bar
from nemo_vlm_ptq.stages.importing import VISION

FILE_BYTES = 5 << 30  # of 16 bit weights a Hugging Face file, whatever the number of ranks


def export(job: Job) -> None:
    """Write every requested target of every format."""
    for fmt in job.plan.formats:
        quantized = job.folder(fmt.name, "quantized")
        store.need_manifest(quantized, "solve")
        for target in job.plan.targets(fmt):
            write = {"trtllm": _write_trtllm, "hf": _write_hf}[target]
            settings: dict[str, Any] = {
                "format": fmt.name,
                "input": store.hash_manifest(quantized),
                "dtype": job.plan.dtype,
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
                lambda write=write, fmt=fmt, folder=folder: write(job, fmt, folder),  # type: ignore[misc]
            )


class _Stream:
    """Layers of a quantized checkpoint in Hugging Face names."""

    def __init__(self, job: Job, fmt: QuantFormat) -> None:
        self.plan, self.fmt = job.plan, fmt
        self.scales = job.folder(fmt.name, "scales")
        self.reader = LayerReader(job.folder(fmt.name, "quantized"))

    def layer(self, index: int) -> Layer:
        """One layer."""
        scales = load_scales(self.scales, index)
        rows, decoder = self.plan.family.rows, self.plan.decoder
        return stream_layer(rows, index, self.reader.read, scales, self.fmt, decoder)

    def ends(self) -> dict[str, torch.Tensor]:
        """Embedding, last norm, head."""
        return stream_ends(self.plan.family.rows, self.reader.read, self.plan.decoder)


def _write_trtllm(job: Job, fmt: QuantFormat, folder: Path) -> Written:
    """llm/ with one file per inference rank, vision/ with what its engine is built from."""
    plan, session = job.plan, job.session
    T, P = plan.recipe.export.tensor, plan.recipe.export.pipeline
    files = []
    for name in ("llm", "vision"):
        (folder / name).mkdir(exist_ok=True)
    mine = deal([(p, t) for p in range(P) for t in range(T)], session.layout.world, session.rank)
    stream = _Stream(job, fmt)
    for p in sorted({p for p, _ in mine}):
        shards = {t: {} for q, t in mine if q == p}  # type: ignore[var-annotated]
        layers = list(trtllm.layers_of(plan.decoder, p, P))
        label = f"export {fmt.name} trtllm"
        for local, index in enumerate(progress_bar(label, "layer", session.rank, layers)):
            layer = stream.layer(index)
            prefix = f"{plan.family.decoder_prefix}model.layers.{index}."
            for t, tensors in shards.items():
                own = trtllm.layer_tensors(layer, prefix, plan.decoder, (t, T), job.dtype)
                start = f"transformer.layers.{local}."
                tensors.update({start + name: value for name, value in own.items()})
        ends = stream.ends()
        for t, tensors in shards.items():
            place = (t, T, p, P)
            prefix = plan.family.decoder_prefix
            tensors.update(trtllm.end_tensors(ends, prefix, plan.decoder, place, job.dtype))
            files.append(f"llm/rank{p * T + t}.safetensors")
            store.save_tensors(tensors, folder / files[-1])
    if session.rank == 0:
        group = plan.recipe.quantize.group_size
        config = trtllm.config(
            plan.family.trtllm_architecture, plan.decoder, fmt, group, plan.dtype, (T, P)
        )
        store.write_json(folder / "llm" / "config.json", config)
        files += ["llm/config.json", *_copy_vision(job, folder / "vision", "vision")]
    return Written(files)


def _copy_vision(job: Job, folder: Path, prefix: str) -> list[str]:
    """Tower and projector with the files that describe and feed them."""
    shutil.copy(job.folder("megatron", VISION), folder / "model.safetensors")
    names = ["model.safetensors"]
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        if (job.plan.folder / name).is_file():
            shutil.copy(job.plan.folder / name, folder / name)
            names.append(name)
    return [f"{prefix}/{name}" for name in names]


def _write_hf(job: Job, fmt: QuantFormat, folder: Path) -> Written:
    """Published names in files of whole layers, the tower and all ends in the last one."""
    plan, session = job.plan, job.session
    stream = _Stream(job, fmt)
    count = _hf_files(job)
    files: list[str] = []
    index: dict[str, str] = {}
    for number in deal(range(count), session.layout.world, session.rank):
        tensors: dict[str, torch.Tensor] = {}
        for layer in split_evenly(range(plan.decoder.layers), count, number):
            content = stream.layer(layer)
            tensors |= {name: t.to(job.dtype) for name, t in content.plain.items()}
            for packed in content.linears.values():
                tensors |= hf.tensors_of(packed, job.dtype)
        if number == count - 1:
            tensors |= {name: t.to(job.dtype) for name, t in stream.ends().items()}
            tensors |= load_file(job.folder("megatron", VISION))
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        store.save_tensors(tensors, folder / name)
        index |= {key: name for key in tensors}
        files.append(name)
    gathered = session.gather(index)
    if session.rank == 0:
        whole = {key: name for part in gathered for key, name in part.items()}
        files += _hf_sidecars(job, fmt, folder, whole)
    return Written(files)


def _hf_files(job: Job) -> int:
    decoder = job.plan.decoder
    width = decoder.hidden * (4 * decoder.hidden + 3 * decoder.ffn)
    return max(1, -(-2 * decoder.layers * width // FILE_BYTES))


def _hf_sidecars(job: Job, fmt: QuantFormat, folder: Path, index: dict[str, str]) -> list[str]:
    """Config, quantization config, index, and the source's tokenizer and processor files."""
    plan = job.plan
    quantized = {name.removesuffix(".weight_scale") for name in index if name.endswith("_scale")}
    excluded = sorted(
        name.removesuffix(".weight")
        for name in index
        if name.endswith(".weight") and name.removesuffix(".weight") not in quantized
    )
    contents = hf.config_files(plan.config, fmt, plan.recipe.quantize.group_size, excluded)
    contents["model.safetensors.index.json"] = {
        "metadata": {},
        "weight_map": dict(sorted(index.items())),
    }
    for name, content in contents.items():
        store.write_json(folder / name, content)
    names = list(contents)
    for path in sorted(plan.folder.iterdir()):
        if path.suffix in (".json", ".model", ".txt") and path.name not in contents:
            shutil.copy(path, folder / path.name)
            names.append(path.name)
    return names
