"""Write checkpoints under published Hugging Face names, one file per group of whole layers.

Shared by the targets hf and compressed_tensors, which differ in the tensors of a linear and in the
description of the quantization.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.checkpoints.streaming_writer import AddTensors, open_streaming_writer
from nemo_vlm_ptq.context import RunContext, StageOutput
from nemo_vlm_ptq.distributed.layout import round_robin, split_evenly
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.targets.writing.encode import EncodedEntry, EncodedLinear, KvScales
from nemo_vlm_ptq.targets.writing.layer_encoder import PREFETCH_LAYERS, LayerEncoder
from nemo_vlm_ptq.targets.writing.packing import concat_rows
from nemo_vlm_ptq.utils.prefetch import prefetch
from nemo_vlm_ptq.workdir import store
from nemo_vlm_ptq.workdir.files import VISION_FILE

SIDECAR_SUFFIXES = (".json", ".model", ".txt")  # tokenizers, processors, configs
INDEX_FILE = "model.safetensors.index.json"
MAX_LAYER_TENSORS = 64
FILE_BYTES = 5 << 30  # 16 bit weights per file, for any number of ranks

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class PublishedFormat:
    """What differs between targets with published names.

    linear_tensors: (linear, model dtype) -> its tensors by suffix.
    kv_tensors: (the layer's qkv entry, scales) -> tensors of its KV cache by full name.
    describe: (context, fmt, names beside the quantized linears) -> JSON files by name.
    encoder: class that encodes layers.
    """

    linear_tensors: Callable[[EncodedLinear, torch.dtype], Tensors]
    kv_tensors: Callable[[EncodedEntry, KvScales], Tensors]
    describe: Callable[[RunContext, QuantFormat, list[str]], dict[str, dict[str, Any]]]
    encoder: type[LayerEncoder] = LayerEncoder


def write_published(
    context: RunContext, fmt: QuantFormat, folder: Path, published: PublishedFormat
) -> StageOutput:
    """Write files of whole layers; the last one also holds tower, projector, embedding and head.

    A family with subfolders keeps them: the quantized decoder is a checkpoint of its own.
    """
    parallel = context.parallel
    encoder = published.encoder(context, fmt)
    for subfolder in context.plan.family.subfolders:
        (folder / subfolder).mkdir(exist_ok=True)
    count, index = _count_files(context), dict[str, str]()
    for number in round_robin(range(count), parallel.layout.world_size, parallel.rank):
        index |= _write_file(context, encoder, published, folder, number, count)
    gathered = parallel.all_gather(index)
    files = sorted(set(index.values()))
    if parallel.rank == 0:
        merged = {key: name for part in gathered for key, name in part.items()}
        files += _write_sidecars(context, fmt, published, folder, merged)
    return StageOutput(files)


def entry_tensors(entry: EncodedEntry, dtype: torch.dtype, published: PublishedFormat) -> Tensors:
    """Return the tensors of one parameter map entry by full name.

    Plain tensors are cast to `dtype`. Parts that are one Hugging Face tensor are concatenated.
    """
    parts: list[Any] = list(entry.parts)
    names = entry.entry.hf_names
    if isinstance(parts[0], torch.Tensor):
        merged = [torch.cat(parts)] if entry.entry.is_fused else parts
        return {name: tensor.to(dtype) for name, tensor in zip(names, merged, strict=True)}
    if entry.entry.is_fused and parts[1:]:
        parts = [fuse_parts(parts)]
    tensors: Tensors = {}
    for name, linear in zip(names, parts, strict=True):
        prefix = name.removesuffix("weight")
        suffixed = published.linear_tensors(linear, dtype)
        tensors |= {prefix + suffix: value for suffix, value in suffixed.items()}
    return tensors


def fuse_parts(parts: list[EncodedLinear]) -> EncodedLinear:
    """Concatenate the parts of a linear along the output dimension.

    Scales per tensor and per input channel are the same in all parts.
    """
    first = parts[0]
    scale, low_rank = first.scale, first.low_rank_b
    if scale.dim():
        scale = concat_rows([part.scale for part in parts])
    if low_rank is not None:
        low_rank = torch.cat([part.low_rank_b for part in parts if part.low_rank_b is not None])
    codes = concat_rows([part.codes for part in parts])
    return replace(first, codes=codes, scale=scale, low_rank_b=low_rank)


def copy_missing(
    source: Path, folder: Path, subfolder: str, accept: Callable[[Path], bool]
) -> list[str]:
    """Copy accepted files of a subfolder that do not exist yet; return names below `folder`."""
    names = []
    for path in sorted((source / subfolder).iterdir()):
        target = folder / subfolder / path.name
        if path.is_file() and accept(path) and not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
            names.append(str(target.relative_to(folder)))
    return names


def unquantized_weights(context: RunContext, names: list[str]) -> tuple[list[str], set[str]]:
    """Return the weights beside the quantized linears, and the quantized linears' weights.

    Args:
        context: plan and ranks.
        names: tensors of the decoder's checkpoint, without its subfolder.
    """
    plan, home = context.plan, context.plan.family.decoder_subfolder
    entries = tuple(entry for entry in plan.family.parameter_map if entry.is_linear)
    quantized = {name.removeprefix(f"{home}/") for name in plan.decoder.shapes(entries)}
    plain = sorted(name for name in names if name.endswith(".weight") and name not in quantized)
    return plain, quantized


def _write_file(
    context: RunContext,
    encoder: LayerEncoder,
    published: PublishedFormat,
    folder: Path,
    number: int,
    count: int,
) -> dict[str, str]:
    """Write file `number` of `count` layer by layer; return tensor -> file."""
    plan, home = context.plan, context.plan.family.decoder_subfolder
    layers = split_evenly(range(plan.decoder.layers), count, number)
    encode = partial(_layer_tensors, context, encoder, published)
    encoded = prefetch(layers, encode, PREFETCH_LAYERS)
    last = _end_tensors(context, encoder, published) if number == count - 1 else ()
    index: dict[str, str] = {}
    with ExitStack() as opened:
        add: dict[str, AddTensors] = {}
        for tensors in chain((layer for _, layer in encoded), last):
            for subfolder in sorted({name.rpartition("/")[0] for name in tensors}):
                prefix = f"{subfolder}/" if subfolder else ""
                suffix = f"-{number + 1:05d}-of-{count:05d}" if subfolder == home else ""
                file = f"{prefix}model{suffix}.safetensors"
                if subfolder not in add:
                    max_tensors = MAX_LAYER_TENSORS * len(layers) + len(plan.tensors)
                    add[subfolder] = opened.enter_context(
                        open_streaming_writer(folder / file, max_tensors)
                    )
                names = [name for name in tensors if name.rpartition("/")[0] == subfolder]
                add[subfolder]({name.removeprefix(prefix): tensors[name] for name in names})
                index |= dict.fromkeys(names, file)
    return index


def _end_tensors(
    context: RunContext, encoder: LayerEncoder, published: PublishedFormat
) -> Iterator[Tensors]:
    """Yield embedding, final norm, head, then tower and projector."""
    for entry in encoder.ends().values():
        yield entry_tensors(entry, context.dtype, published)
    yield load_file(context.folder("megatron", VISION_FILE))


def _layer_tensors(
    context: RunContext, encoder: LayerEncoder, published: PublishedFormat, index: int
) -> Tensors:
    """Return the tensors of one layer under published names."""
    entries, kv = encoder.layer(index), encoder.kv(index)
    tensors = {} if kv is None else dict(published.kv_tensors(entries["linear_qkv"], kv))
    for entry in entries.values():
        tensors |= entry_tensors(entry, context.dtype, published)
    return tensors


def _count_files(context: RunContext) -> int:
    decoder = context.plan.decoder
    width = decoder.hidden * (4 * decoder.hidden + 3 * decoder.ffn)
    return max(1, -(-2 * decoder.layers * width // FILE_BYTES))


def _write_sidecars(
    context: RunContext,
    fmt: QuantFormat,
    published: PublishedFormat,
    folder: Path,
    index: Mapping[str, str],
) -> list[str]:
    """Write configs and index, and copy the source's tokenizer, processor and code files."""
    plan, home = context.plan, context.plan.family.decoder_subfolder
    prefix = f"{home}/" if home else ""
    weight_map = {
        name.removeprefix(prefix): file.removeprefix(prefix)
        for name, file in sorted(index.items())
        if name.startswith(prefix)
    }
    described = published.describe(context, fmt, list(weight_map))
    contents: dict[str, Any] = {prefix + name: content for name, content in described.items()}
    contents[prefix + INDEX_FILE] = {"metadata": {}, "weight_map": weight_map}
    for name, content in ({"config.json": plan.export_config} | contents).items():
        store.write_json(folder / name, content)
    names = sorted({"config.json", *contents})

    def is_sidecar(path: Path) -> bool:  # code is copied for the server, and never run here
        return path.suffix in (*SIDECAR_SUFFIXES, ".py") and path.name != INDEX_FILE

    for subfolder in {"", *plan.family.subfolders}:
        names += copy_missing(plan.folder, folder, subfolder, is_sidecar)
    return names
