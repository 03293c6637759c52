"""Checkpoints under published names: modelopt's unified ones, and compressed-tensors'."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.checkpoints.streaming_writer import Add, tensor_file
from nemo_vlm_ptq.context import RunContext, StageOutput
from nemo_vlm_ptq.distributed.layout import round_robin, split_evenly
from nemo_vlm_ptq.formats import KV_CACHES, QuantFormat
from nemo_vlm_ptq.stages.import_model import VISION_FILE
from nemo_vlm_ptq.targets.compressed_tensors import tensors as compressed_tensors
from nemo_vlm_ptq.targets.hf import nf4
from nemo_vlm_ptq.targets.hf import tensors as hf
from nemo_vlm_ptq.targets.writing.layer_encoder import PREFETCH_LAYERS, LayerEncoder
from nemo_vlm_ptq.utils.prefetch import prefetch
from nemo_vlm_ptq.workdir import store

SIDECAR_SUFFIXES = (".json", ".model", ".txt")  # files of tokenizers, processors, configs
MAX_LAYER_TENSORS = 64  # tensors of a layer
FILE_BYTES = 5 << 30  # of 16 bit weights a file, whatever the number of ranks
# Target -> what names and packs its tensors.
TARGETS: dict[str, ModuleType] = {"hf": hf, "compressed_tensors": compressed_tensors}


def copy_missing(
    source: Path, folder: Path, part: str, wanted: Callable[[Path], bool]
) -> list[str]:
    """Copy wanted files of a sub-folder that are not there yet; their names from `folder`."""
    names = []
    for path in sorted((source / part).iterdir()):
        target = folder / part / path.name
        if path.is_file() and wanted(path) and not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
            names.append(str(target.relative_to(folder)))
    return names


def write_published(job: RunContext, fmt: QuantFormat, target: str, folder: Path) -> StageOutput:
    """Files of whole layers, the tower and all ends in the last one.

    A family of several folders keeps them: its quantized decoder is a checkpoint of its own.
    """
    plan, parallel = job.plan, job.parallel
    stream = LayerEncoder(job, fmt, folds=target == "compressed_tensors")
    for part in plan.family.subfolders:
        (folder / part).mkdir(exist_ok=True)
    count, index = _count_files(job), dict[str, str]()
    for number in round_robin(range(count), parallel.layout.world, parallel.rank):
        index |= _write_file(job, stream, TARGETS[target], folder, number, count)
    gathered = parallel.gather(index)
    files = sorted(set(index.values()))
    if parallel.rank == 0:
        whole = {key: name for part in gathered for key, name in part.items()}
        files += _sidecars(job, fmt, target, folder, whole)
    return StageOutput(files)


def _write_file(
    job: RunContext, stream: LayerEncoder, names: ModuleType, folder: Path, number: int, count: int
) -> dict[str, str]:
    """File `number` of `count`, written layer by layer; tensor -> file, as published."""
    plan, home = job.plan, job.plan.family.decoder_subfolder
    layers = split_evenly(range(plan.decoder.layers), count, number)
    made = prefetch(layers, partial(_layer, job, stream, names), PREFETCH_LAYERS)
    given = chain(
        (own for _, own in made), _ends(job, stream, names) if number == count - 1 else ()
    )
    index: dict[str, str] = {}
    with ExitStack() as opened:
        add: dict[str, Add] = {}
        for tensors in given:
            for part in sorted({name.rpartition("/")[0] for name in tensors}):
                start = f"{part}/" if part else ""
                numbered = f"-{number + 1:05d}-of-{count:05d}" if part == home else ""
                file = f"{start}model{numbered}.safetensors"
                if part not in add:
                    room = MAX_LAYER_TENSORS * len(layers) + len(plan.tensors)
                    add[part] = opened.enter_context(tensor_file(folder / file, room))
                own = [name for name in tensors if name.rpartition("/")[0] == part]
                add[part]({name.removeprefix(start): tensors[name] for name in own})
                index |= dict.fromkeys(own, file)
    return index


def _ends(
    job: RunContext, stream: LayerEncoder, names: ModuleType
) -> Iterator[dict[str, torch.Tensor]]:
    """What is no layer: embedding, last norm, head, tower and projector."""
    for piece in stream.ends().values():
        yield names.published_tensors(piece, job.dtype)
    yield load_file(job.folder("megatron", VISION_FILE))


def _layer(
    job: RunContext, stream: LayerEncoder, names: ModuleType, index: int
) -> dict[str, torch.Tensor]:
    """Tensors of a layer under published names."""
    pieces, kv = stream.layer(index), stream.kv(index)
    tensors = {} if kv is None else dict(names.kv_tensors(pieces["linear_qkv"], kv))
    for piece in pieces.values():
        tensors |= names.published_tensors(piece, job.dtype)
    return tensors


def _count_files(job: RunContext) -> int:
    decoder = job.plan.decoder
    width = decoder.hidden * (4 * decoder.hidden + 3 * decoder.ffn)
    return max(1, -(-2 * decoder.layers * width // FILE_BYTES))


def _describe_quantization(
    job: RunContext, fmt: QuantFormat, target: str, names: list[str]
) -> dict[str, dict[str, Any]]:
    """Name -> JSON of the files that say how the decoder beside them is quantized."""
    plan, home = job.plan, job.plan.family.decoder_subfolder
    source = plan.family.decoder_config(plan.export_config)
    if fmt.weight == "nf4":
        beside = [name for name in plan.vision_names if name.rpartition("/")[0] == home]
        config = nf4.quantization_config(plan.dtype, beside)
        return {"config.json": source | {"quantization_config": config}}
    linears = plan.decoder.shapes(tuple(row for row in plan.family.parameter_map if row.is_linear))
    quantized = {name.removeprefix(f"{home}/") for name in linears}
    beside = sorted(name for name in names if name.endswith(".weight") and name not in quantized)
    kv, group = KV_CACHES.get(plan.recipe.quantize.kv_cache), plan.recipe.quantize.group_size
    if target == "compressed_tensors":
        start = f"{home}/" if home else ""
        shapes = {name: plan.tensors[start + name].shape for name in beside}
        ignore = compressed_tensors.ignore_patterns(shapes, quantized)
        config = compressed_tensors.quantization_config(fmt, group, ignore, kv)
        return {"config.json": source | {"quantization_config": config}}
    excluded = [name.removesuffix(".weight") for name in beside]
    return hf.config_files(source, hf.quantization_block(fmt, group, excluded, kv))


def _sidecars(
    job: RunContext, fmt: QuantFormat, target: str, folder: Path, index: dict[str, str]
) -> list[str]:
    """Config, quantization config, index, and the source's tokenizer, processor and code files."""
    plan, home = job.plan, job.plan.family.decoder_subfolder
    start = f"{home}/" if home else ""
    own = {
        name.removeprefix(start): file.removeprefix(start)
        for name, file in sorted(index.items())
        if name.startswith(start)
    }
    described = _describe_quantization(job, fmt, target, list(own))
    contents: dict[str, Any] = {start + name: content for name, content in described.items()}
    contents[f"{start}model.safetensors.index.json"] = {"metadata": {}, "weight_map": own}
    for name, content in ({"config.json": plan.export_config} | contents).items():
        store.write_json(folder / name, content)
    names = sorted({"config.json", *contents})

    def describes(path: Path) -> bool:  # code is for the reader of the export: here none is run
        kept = path.suffix in (*SIDECAR_SUFFIXES, ".py")
        return kept and path.name != "model.safetensors.index.json"

    for part in {"", *plan.family.subfolders}:
        names += copy_missing(plan.folder, folder, part, describes)
    return names
