"""Write checkpoints under published Hugging Face names, one file per group of whole layers.

Shared by the targets hf and compressed_tensors, which differ in the tensors of a linear and in the
description of the quantization.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq.checkpoints.model_folder import check_file, is_sidecar
from nemo_vlm_ptq.checkpoints.streaming_writer import AddTensors, open_streaming_writer
from nemo_vlm_ptq.context import RunContext, StageOutput
from nemo_vlm_ptq.distributed.layout import round_robin, split_evenly
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.megatron.parallel_context import cores_per_rank
from nemo_vlm_ptq.sources.decoder_weights import DecoderWeights, open_weights, read_vision
from nemo_vlm_ptq.targets.writing.encode import EncodedEntry, EncodedLinear, KvScales
from nemo_vlm_ptq.targets.writing.layer_encoder import LayerEncoder
from nemo_vlm_ptq.targets.writing.packing import concat_rows
from nemo_vlm_ptq.utils.pinned_memory import to_host
from nemo_vlm_ptq.utils.prefetch import prefetch
from nemo_vlm_ptq.workdir import store

INDEX_FILE = "model.safetensors.index.json"
MAX_LAYER_TENSORS = 64
FILE_BYTES = 2 << 30  # 16 bit weights per file; files are written and hashed in parallel

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


@dataclass(frozen=True, kw_only=True)
class PublishedExport:
    """One checkpoint to write: format, folder, and what its target writes."""

    fmt: QuantFormat
    folder: Path
    published: PublishedFormat


class PublishedFiles:
    """Files of checkpoints, written by threads of this rank as soon as their layers are solved.

    The last file of a checkpoint also holds tower, projector, embedding and head. A family with
    subfolders keeps them: the quantized decoder is a checkpoint of its own.

    Args:
        context: plan and ranks.
        exports: the checkpoints; their folders exist.
        threads: files that are written at once.
    """

    def __init__(
        self, context: RunContext, exports: Sequence[PublishedExport], threads: int
    ) -> None:
        self._context, self.exports = context, exports
        self._opened = ExitStack()
        device = context.parallel.device
        self._weights = self._opened.enter_context(open_weights(context.plan, device))
        self._threads = ThreadPoolExecutor(min(threads, cores_per_rank()))
        self._count = count_files(context)
        layout, rank = context.parallel.layout, context.parallel.rank
        files = [(position, n) for n in range(self._count) for position in range(len(exports))]
        self._waiting = list(round_robin(files, layout.world_size, rank))
        self._written: list[tuple[int, Future[dict[str, str]]]] = []

    def advance(self, solved: Collection[int]) -> None:
        """Start to write the files whose layers are all solved.

        Args:
            solved: layers whose scales every rank can read.
        """
        layers = range(self._context.plan.decoder.layers)
        waiting, self._waiting = self._waiting, []
        for position, number in waiting:
            if set(split_evenly(layers, self._count, number)) <= set(solved):
                export = self.exports[position]
                arguments = (self._context, self._weights, export, number, self._count)
                self._written.append((position, self._threads.submit(_write_file, *arguments)))
            else:
                self._waiting.append((position, number))

    def finish(self) -> list[StageOutput]:
        """Write what is left, and index and configs of every checkpoint (collective)."""
        self.advance(range(self._context.plan.decoder.layers))
        indices: list[dict[str, str]] = [{} for _ in self.exports]
        with self._opened, self._threads:
            for position, future in self._written:
                indices[position] |= future.result()
        outputs, parallel = [], self._context.parallel
        for export, index in zip(self.exports, indices, strict=True):
            gathered = parallel.all_gather(index)
            written = sorted(set(index.values()))
            if parallel.rank == 0:
                merged = {key: name for part in gathered for key, name in part.items()}
                written += _write_sidecars(self._context, export, merged)
            outputs.append(StageOutput(written))
        return outputs


def entry_tensors(entry: EncodedEntry, dtype: torch.dtype, published: PublishedFormat) -> Tensors:
    """Return the tensors of one parameter map entry by full name.

    Plain tensors are cast to `dtype`, unless the entry keeps its own. Parts that are one Hugging
    Face tensor are concatenated.
    """
    parts: list[Any] = list(entry.parts)
    names = entry.entry.hf_names
    if isinstance(parts[0], torch.Tensor):
        merged = [torch.cat(parts)] if entry.entry.is_fused else parts
        if not entry.entry.keeps_dtype:
            merged = [tensor.to(dtype) for tensor in merged]
        return dict(zip(names, merged, strict=True))
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
    """Copy accepted files of a subfolder that do not exist yet; return names below `folder`.

    Raises:
        UserError: a file is a link out of the source.
    """
    names = []
    for path in sorted((source / subfolder).iterdir()):
        target = folder / subfolder / path.name
        if accept(path) and path.is_file() and not target.exists():
            check_file(path, source)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
            names.append(str(target.relative_to(folder)))
    return names


def unquantized_weights(context: RunContext, names: list[str]) -> tuple[list[str], set[str]]:
    """Return the weights beside the quantized linears, and the quantized linears' weights.

    A tied head is among the former: checkpoints do not hold it, and readers have a linear for it.

    Args:
        context: plan and ranks.
        names: tensors of the decoder's checkpoint, without its subfolder.
    """
    plan, home = context.plan, context.plan.family.decoder_subfolder
    entries = tuple(entry for entry in plan.parameter_map if entry.is_linear)
    quantized = {name.removeprefix(f"{home}/") for name in plan.decoder.shapes(entries)}
    plain = {name for name in names if name.endswith(".weight") and name not in quantized}
    if plan.decoder.tied_head:
        plain.add(plan.head_name.removeprefix(f"{home}/"))
    return sorted(plain), quantized


def _write_file(
    context: RunContext,
    weights: DecoderWeights,
    export: PublishedExport,
    number: int,
    count: int,
) -> dict[str, str]:
    """Write file `number` of `count` layer by layer; return tensor -> file."""
    plan, home = context.plan, context.plan.family.decoder_subfolder
    folder, published = export.folder, export.published
    for subfolder in plan.family.subfolders:
        (folder / subfolder).mkdir(exist_ok=True)
    encoder = published.encoder(context, export.fmt, weights)
    layers = split_evenly(range(plan.decoder.layers), count, number)
    encode = partial(layer_tensors, context, encoder, published)
    encoded = prefetch(layers, encode)
    last = end_tensors(context, encoder, published) if number == count - 1 else ()
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


def end_tensors(
    context: RunContext, encoder: LayerEncoder, published: PublishedFormat
) -> Iterator[Tensors]:
    """Yield embedding, final norm, head, then tower and projector."""
    with encoder.stream():
        ends = encoder.ends()
        tensors = [to_host(entry_tensors(one, context.dtype, published)) for one in ends.values()]
    yield from tensors
    yield read_vision(context.plan)


def layer_tensors(
    context: RunContext, encoder: LayerEncoder, published: PublishedFormat, index: int
) -> Tensors:
    """Return the tensors of one layer under published names, in host memory."""
    with encoder.stream():
        entries, kv = encoder.layer(index), encoder.kv(index)
        tensors = {} if kv is None else dict(published.kv_tensors(entries["linear_qkv"], kv))
        for entry in entries.values():
            tensors |= entry_tensors(entry, context.dtype, published)
        return to_host(tensors)


def count_files(context: RunContext) -> int:
    decoder = context.plan.decoder
    width = decoder.hidden * (4 * decoder.hidden + 3 * decoder.ffn)
    return max(1, -(-2 * decoder.layers * width // FILE_BYTES))


def json_contents(
    context: RunContext, fmt: QuantFormat, published: PublishedFormat, index: Mapping[str, str]
) -> dict[str, Any]:
    """Return the content of the JSON files that are made for an export; index: tensor -> file."""
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
    return {"config.json": plan.export_config} | contents


def _write_sidecars(
    context: RunContext, export: PublishedExport, index: Mapping[str, str]
) -> list[str]:
    """Write configs and index, and copy the source's tokenizer, processor and code files."""
    plan, folder = context.plan, export.folder
    contents = json_contents(context, export.fmt, export.published, index)
    for name, content in contents.items():
        store.write_json(folder / name, content)
    names = sorted(contents)
    for subfolder in {"", *plan.family.subfolders}:
        names += copy_missing(plan.folder, folder, subfolder, is_sidecar)
    return names
