"""export: a quantized Megatron model becomes what others read, every rank writing its files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq import store
from nemo_vlm_ptq.calibrate.solve import load_kv, load_scales
from nemo_vlm_ptq.export import hf, nf4, trtllm
from nemo_vlm_ptq.export.stream import KvScales, Layer, kv_scales, stream_ends, stream_layer
from nemo_vlm_ptq.formats import KV_CACHES, QuantFormat
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
                lambda write=write, fmt=fmt, folder=folder: write(job, fmt, folder),  # type: ignore[misc]
            )


class _Stream:
    """Layers of a quantized checkpoint.

    In nf4 that one holds rounded weights, whose blocks have lost their absmaxes; codes are made of
    the imported weights.
    """

    def __init__(self, job: Job, fmt: QuantFormat) -> None:
        self.plan, self.fmt = job.plan, fmt
        self.kv_format = KV_CACHES.get(job.plan.recipe.quantize.kv_cache)
        self.scales = job.folder(fmt.name, "scales")
        folder = ("megatron",) if fmt.weight == "nf4" else (fmt.name, "quantized")
        self.reader = LayerReader(job.folder(*folder))

    def layer(self, index: int) -> Layer:
        """One layer."""
        scales = load_scales(self.scales, index)
        rows, decoder = self.plan.family.rows, self.plan.decoder
        return stream_layer(rows, index, self.reader.read, scales, self.fmt, decoder)

    def kv(self, index: int) -> KvScales | None:
        """Scales of one layer's KV cache, if it is rounded."""
        if self.kv_format is None:
            return None
        key, value = load_kv(self.scales, index)
        return kv_scales(key, value, self.kv_format)

    def ends(self) -> Layer:
        """Embedding, last norm, head."""
        return stream_ends(self.plan.family.rows, self.reader.read, self.plan.decoder)


def _write_trtllm(job: Job, fmt: QuantFormat, folder: Path) -> Written:
    """llm/ with one file per inference rank, vision/ with what its engine is built from."""
    plan, session = job.plan, job.session
    T, P = plan.recipe.export.tensor, plan.recipe.export.pipeline
    architecture = plan.family.trtllm_architecture
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
        names += _copy_new(job.plan.folder, folder, part, lambda path: path.name in own)
    return [f"{prefix}/{name}" for name in names]


def _copy_new(source: Path, folder: Path, part: str, wanted: Callable[[Path], bool]) -> list[str]:
    """Copy wanted files of a sub-folder that are not there yet; their names from `folder`."""
    names = []
    for path in sorted((source / part).iterdir()):
        target = folder / part / path.name
        if path.is_file() and wanted(path) and not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
            names.append(str(target.relative_to(folder)))
    return names


def _write_hf(job: Job, fmt: QuantFormat, folder: Path) -> Written:
    """Published names in files of whole layers, the tower and all ends in the last one.

    A family of several folders keeps them: its quantized decoder is a checkpoint of its own.
    """
    plan, session = job.plan, job.session
    stream, count, home = _Stream(job, fmt), _hf_files(job), plan.family.decoder_part
    for part in plan.family.parts:
        (folder / part).mkdir(exist_ok=True)
    index: dict[str, str] = {}
    for number in deal(range(count), session.layout.world, session.rank):
        tensors: dict[str, torch.Tensor] = {}
        for layer in split_evenly(range(plan.decoder.layers), count, number):
            pieces, kv = stream.layer(layer), stream.kv(layer)
            for piece in pieces.values():
                tensors |= hf.tensors_of(piece, job.dtype)
            tensors |= {} if kv is None else hf.kv_tensors(pieces["linear_qkv"], kv)
        if number == count - 1:
            for piece in stream.ends().values():
                tensors |= hf.tensors_of(piece, job.dtype)
            tensors |= load_file(job.folder("megatron", VISION))
        for part in {name.rpartition("/")[0] for name in tensors}:
            start = f"{part}/" if part else ""
            own = {
                name.removeprefix(start): tensor
                for name, tensor in tensors.items()
                if name.rpartition("/")[0] == part
            }
            file = f"model-{number + 1:05d}-of-{count:05d}" if part == home else "model"
            store.save_tensors(own, folder / part / f"{file}.safetensors")
            index |= {start + name: f"{start}{file}.safetensors" for name in own}
    gathered = session.gather(index)
    files = sorted(set(index.values()))
    if session.rank == 0:
        whole = {key: name for part in gathered for key, name in part.items()}
        files += _hf_sidecars(job, fmt, folder, whole)
    return Written(files)


def _hf_files(job: Job) -> int:
    decoder = job.plan.decoder
    width = decoder.hidden * (4 * decoder.hidden + 3 * decoder.ffn)
    return max(1, -(-2 * decoder.layers * width // FILE_BYTES))


def _describe_quantization(
    job: Job, fmt: QuantFormat, names: list[str]
) -> dict[str, dict[str, Any]]:
    """Name -> JSON of the files that say how the decoder beside them is quantized."""
    plan, home = job.plan, job.plan.family.decoder_part
    source = plan.family.decoder_config(plan.config)
    if fmt.weight == "nf4":
        beside = [name for name in plan.vision if name.rpartition("/")[0] == home]
        config = nf4.quantization_config(plan.dtype, beside)
        return {"config.json": source | {"quantization_config": config}}
    linears = plan.decoder.shapes(tuple(row for row in plan.family.rows if row.linear))
    quantized = {name.removeprefix(f"{home}/") for name in linears}
    excluded = sorted(
        name.removesuffix(".weight")
        for name in names
        if name.endswith(".weight") and name not in quantized
    )
    kv = KV_CACHES.get(plan.recipe.quantize.kv_cache)
    block = hf.quantization_block(fmt, plan.recipe.quantize.group_size, excluded, kv)
    return hf.config_files(source, block)


def _hf_sidecars(job: Job, fmt: QuantFormat, folder: Path, index: dict[str, str]) -> list[str]:
    """Config, quantization config, index, and the source's tokenizer and processor files."""
    plan, home = job.plan, job.plan.family.decoder_part
    start = f"{home}/" if home else ""
    own = {
        name.removeprefix(start): file.removeprefix(start)
        for name, file in sorted(index.items())
        if name.startswith(start)
    }
    described = _describe_quantization(job, fmt, list(own))
    contents: dict[str, Any] = {start + name: content for name, content in described.items()}
    contents[f"{start}model.safetensors.index.json"] = {"metadata": {}, "weight_map": own}
    for name, content in ({"config.json": plan.config} | contents).items():
        store.write_json(folder / name, content)
    names = sorted({"config.json", *contents})

    def describes(path: Path) -> bool:
        kept = path.suffix in (".json", ".model", ".txt")
        return kept and path.name != "model.safetensors.index.json"

    for part in {"", *plan.family.parts}:
        names += _copy_new(plan.folder, folder, part, describes)
    return names
