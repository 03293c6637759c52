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

from nemo_vlm_ptq import store
from nemo_vlm_ptq.ahead import made_ahead
from nemo_vlm_ptq.export import compressed_tensors, hf, nf4
from nemo_vlm_ptq.formats import KV_CACHES, QuantFormat
from nemo_vlm_ptq.job import Job, Written
from nemo_vlm_ptq.parallel import deal, split_evenly
from nemo_vlm_ptq.stages.importing import VISION
from nemo_vlm_ptq.stages.streaming import AHEAD, Stream
from nemo_vlm_ptq.tensor_file import Add, tensor_file

DESCRIBING = (".json", ".model", ".txt")  # files of tokenizers, processors, configs
MOST = 64  # tensors of a layer
FILE_BYTES = 5 << 30  # of 16 bit weights a file, whatever the number of ranks
# Target -> what names and packs its tensors.
TARGETS: dict[str, ModuleType] = {"hf": hf, "compressed_tensors": compressed_tensors}


def copy_new(source: Path, folder: Path, part: str, wanted: Callable[[Path], bool]) -> list[str]:
    """Copy wanted files of a sub-folder that are not there yet; their names from `folder`."""
    names = []
    for path in sorted((source / part).iterdir()):
        target = folder / part / path.name
        if path.is_file() and wanted(path) and not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
            names.append(str(target.relative_to(folder)))
    return names


def write_published(job: Job, fmt: QuantFormat, target: str, folder: Path) -> Written:
    """Files of whole layers, the tower and all ends in the last one.

    A family of several folders keeps them: its quantized decoder is a checkpoint of its own.
    """
    plan, session = job.plan, job.session
    stream = Stream(job, fmt, folds=target == "compressed_tensors")
    for part in plan.family.parts:
        (folder / part).mkdir(exist_ok=True)
    count, index = _count_files(job), dict[str, str]()
    for number in deal(range(count), session.layout.world, session.rank):
        index |= _write_file(job, stream, TARGETS[target], folder, number, count)
    gathered = session.gather(index)
    files = sorted(set(index.values()))
    if session.rank == 0:
        whole = {key: name for part in gathered for key, name in part.items()}
        files += _sidecars(job, fmt, target, folder, whole)
    return Written(files)


def _write_file(
    job: Job, stream: Stream, names: ModuleType, folder: Path, number: int, count: int
) -> dict[str, str]:
    """File `number` of `count`, written layer by layer; tensor -> file, as published."""
    plan, home = job.plan, job.plan.family.decoder_part
    layers = split_evenly(range(plan.decoder.layers), count, number)
    made = made_ahead(layers, partial(_layer, job, stream, names), AHEAD)
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
                    room = MOST * len(layers) + len(plan.tensors)
                    add[part] = opened.enter_context(tensor_file(folder / file, room))
                own = [name for name in tensors if name.rpartition("/")[0] == part]
                add[part]({name.removeprefix(start): tensors[name] for name in own})
                index |= dict.fromkeys(own, file)
    return index


def _ends(job: Job, stream: Stream, names: ModuleType) -> Iterator[dict[str, torch.Tensor]]:
    """What is no layer: embedding, last norm, head, tower and projector."""
    for piece in stream.ends().values():
        yield names.tensors_of(piece, job.dtype)
    yield load_file(job.folder("megatron", VISION))


def _layer(job: Job, stream: Stream, names: ModuleType, index: int) -> dict[str, torch.Tensor]:
    """Tensors of a layer under published names."""
    pieces, kv = stream.layer(index), stream.kv(index)
    tensors = {} if kv is None else dict(names.kv_tensors(pieces["linear_qkv"], kv))
    for piece in pieces.values():
        tensors |= names.tensors_of(piece, job.dtype)
    return tensors


def _count_files(job: Job) -> int:
    decoder = job.plan.decoder
    width = decoder.hidden * (4 * decoder.hidden + 3 * decoder.ffn)
    return max(1, -(-2 * decoder.layers * width // FILE_BYTES))


def _describe_quantization(
    job: Job, fmt: QuantFormat, target: str, names: list[str]
) -> dict[str, dict[str, Any]]:
    """Name -> JSON of the files that say how the decoder beside them is quantized."""
    plan, home = job.plan, job.plan.family.decoder_part
    source = plan.family.decoder_config(plan.written_config)
    if fmt.weight == "nf4":
        beside = [name for name in plan.vision if name.rpartition("/")[0] == home]
        config = nf4.quantization_config(plan.dtype, beside)
        return {"config.json": source | {"quantization_config": config}}
    linears = plan.decoder.shapes(tuple(row for row in plan.family.rows if row.linear))
    quantized = {name.removeprefix(f"{home}/") for name in linears}
    beside = sorted(name for name in names if name.endswith(".weight") and name not in quantized)
    kv, group = KV_CACHES.get(plan.recipe.quantize.kv_cache), plan.recipe.quantize.group_size
    if target == "compressed_tensors":
        start = f"{home}/" if home else ""
        shapes = {name: plan.tensors[start + name].shape for name in beside}
        ignore = compressed_tensors.patterns_to_ignore(shapes, quantized)
        config = compressed_tensors.quantization_config(fmt, group, ignore, kv)
        return {"config.json": source | {"quantization_config": config}}
    excluded = [name.removesuffix(".weight") for name in beside]
    return hf.config_files(source, hf.quantization_block(fmt, group, excluded, kv))


def _sidecars(
    job: Job, fmt: QuantFormat, target: str, folder: Path, index: dict[str, str]
) -> list[str]:
    """Config, quantization config, index, and the source's tokenizer, processor and code files."""
    plan, home = job.plan, job.plan.family.decoder_part
    start = f"{home}/" if home else ""
    own = {
        name.removeprefix(start): file.removeprefix(start)
        for name, file in sorted(index.items())
        if name.startswith(start)
    }
    described = _describe_quantization(job, fmt, target, list(own))
    contents: dict[str, Any] = {start + name: content for name, content in described.items()}
    contents[f"{start}model.safetensors.index.json"] = {"metadata": {}, "weight_map": own}
    for name, content in ({"config.json": plan.written_config} | contents).items():
        store.write_json(folder / name, content)
    names = sorted({"config.json", *contents})

    def describes(path: Path) -> bool:  # code is for the reader of the export: here none is run
        kept = path.suffix in (*DESCRIBING, ".py")
        return kept and path.name != "model.safetensors.index.json"

    for part in {"", *plan.family.parts}:
        names += copy_new(plan.folder, folder, part, describes)
    return names
