"""Write TensorRT-LLM engine checkpoints: llm/ with a file per serving rank, and vision/.

File r belongs to pipeline rank p and tensor rank t of the serving layout, r = p * T + t. One
process writes each rank file, layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq.checkpoints.streaming_writer import AddTensors, open_streaming_writer
from nemo_vlm_ptq.context import RunContext, StageOutput
from nemo_vlm_ptq.distributed.layout import round_robin
from nemo_vlm_ptq.formats import KV_CACHES, QuantFormat
from nemo_vlm_ptq.sources.decoder_weights import open_weights, read_vision
from nemo_vlm_ptq.targets.trtllm import tensors as trtllm
from nemo_vlm_ptq.targets.trtllm.config import checkpoint_config
from nemo_vlm_ptq.targets.writing.expected import ExpectedExport, FileTensors, copies
from nemo_vlm_ptq.targets.writing.layer_encoder import PREFETCH_LAYERS, LayerEncoder
from nemo_vlm_ptq.targets.writing.published import copy_missing
from nemo_vlm_ptq.utils.pinned_memory import to_host
from nemo_vlm_ptq.utils.prefetch import prefetch
from nemo_vlm_ptq.utils.progress import progress_bar
from nemo_vlm_ptq.workdir import store

VISION_SIDECARS = ("config.json", "preprocessor_config.json", "processor_config.json")


def write(context: RunContext, fmt: QuantFormat, folder: Path) -> StageOutput:
    """Write llm/ and vision/ of one format into a folder (collective)."""
    for name in ("llm", "vision"):
        (folder / name).mkdir(exist_ok=True)
    if context.parallel.rank:
        return StageOutput(_write_rank_files(context, fmt, folder))
    with ThreadPoolExecutor(1) as thread:
        vision = thread.submit(_copy_vision, context, folder / "vision")
        files = _write_rank_files(context, fmt, folder)
        return StageOutput([*files, *_write_config(context, fmt, folder), *vision.result()])


def expected(context: RunContext, fmt: QuantFormat) -> ExpectedExport:
    """Return what llm/ and vision/ of a format must hold."""
    plan = context.plan
    copied = copies(context, _vision_subfolders(context), _is_vision_sidecar)
    return ExpectedExport(
        tensors=_expected_tensors(context, fmt),
        make_json=lambda _: {
            "llm/config.json": _config(context, fmt),
            "vision/config.json": plan.export_config,
        },
        copied={f"vision/{name}": path for name, path in copied.items() if name != "config.json"},
    )


def _expected_tensors(context: RunContext, fmt: QuantFormat) -> Iterator[FileTensors]:
    plan = context.plan
    T, P = plan.recipe.export.tensor, plan.recipe.export.pipeline
    with open_weights(plan, context.parallel.device) as weights:
        encoder = LayerEncoder(context, fmt, weights)
        for p in range(P):
            files = {t: f"llm/rank{p * T + t}.safetensors" for t in range(T)}
            for t, file in files.items():
                yield file, _end_tensors(context, encoder, (p, t))
            layers = trtllm.layers_of(plan.decoder, p, P)
            for index in layers:
                prefix = f"transformer.layers.{index - layers[0]}."
                for t, tensors in _layer_tensors(context, encoder, index, (list(files), T)).items():
                    yield files[t], {prefix + key: value for key, value in tensors.items()}
    yield "vision/model.safetensors", read_vision(plan)


def _end_tensors(
    context: RunContext, encoder: LayerEncoder, rank: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Return embedding, final norm and head of serving rank (p, t)."""
    plan, (p, t) = context.plan, rank
    T, P = plan.recipe.export.tensor, plan.recipe.export.pipeline
    with encoder.stream():
        architecture, ends = plan.family.trtllm_architecture, encoder.ends((t, T))
        return to_host(trtllm.end_tensors(ends, architecture, (p, P), context.dtype))


def _config(context: RunContext, fmt: QuantFormat) -> dict[str, Any]:
    plan = context.plan
    export, quantize = plan.recipe.export, plan.recipe.quantize
    return checkpoint_config(
        plan.family.trtllm_architecture,
        plan.decoder,
        fmt,
        quantize.group_size,
        plan.dtype,
        (export.tensor, export.pipeline),
        KV_CACHES.get(quantize.kv_cache),
    )


def _write_config(context: RunContext, fmt: QuantFormat, folder: Path) -> list[str]:
    store.write_json(folder / "llm" / "config.json", _config(context, fmt))
    return ["llm/config.json"]


def _write_rank_files(context: RunContext, fmt: QuantFormat, folder: Path) -> list[str]:
    """Write the files of the serving ranks that are assigned to this process."""
    plan, parallel = context.plan, context.parallel
    T, P = plan.recipe.export.tensor, plan.recipe.export.pipeline
    ranks = [(p, t) for p in range(P) for t in range(T)]
    assigned, names = round_robin(ranks, parallel.layout.world_size, parallel.rank), []
    with open_weights(plan, parallel.device) as weights:
        encoder = LayerEncoder(context, fmt, weights)
        for p in sorted({p for p, _ in assigned}):
            files = {t: f"llm/rank{p * T + t}.safetensors" for q, t in assigned if q == p}
            names += list(files.values())
            _write_stage(context, encoder, folder, p, files)
    return names


def _write_stage(
    context: RunContext, encoder: LayerEncoder, folder: Path, p: int, files: dict[int, str]
) -> None:
    """Write the files of some tensor ranks of pipeline stage p; files: tensor rank -> name."""
    plan = context.plan
    T, P = plan.recipe.export.tensor, plan.recipe.export.pipeline
    layers = trtllm.layers_of(plan.decoder, p, P)
    encoded = prefetch(
        layers, lambda index: _layer_tensors(context, encoder, index, (list(files), T)),
        PREFETCH_LAYERS,
    )  # fmt: skip
    label = f"export {encoder.fmt.name} trtllm"
    bar = progress_bar(label, "layer", context.parallel.rank, len(layers))
    with bar, ExitStack() as opened:
        add: dict[int, AddTensors] = {}
        for t, name in files.items():  # embedding and head are written while layers are encoded
            count = trtllm.MAX_LAYER_TENSORS * len(layers) + len(trtllm.ENDS)
            add[t] = opened.enter_context(open_streaming_writer(folder / name, count))
            add[t](_end_tensors(context, encoder, (p, t)))
        for index, by_rank in encoded:
            prefix = f"transformer.layers.{index - layers[0]}."
            for t, tensors in by_rank.items():
                add[t]({prefix + key: value for key, value in tensors.items()})
            bar.update()


def _layer_tensors(
    context: RunContext, encoder: LayerEncoder, index: int, shards: tuple[list[int], int]
) -> dict[int, dict[str, torch.Tensor]]:
    """Return the tensors of a layer for some serving ranks; shards: (ranks, T)."""
    architecture = context.plan.family.trtllm_architecture
    kv = encoder.kv(index)
    kv_tensors = {} if kv is None else trtllm.kv_tensors(kv)
    with encoder.stream():
        layers = encoder.shards(index, *shards)
        return {
            t: to_host(trtllm.layer_tensors(layer, architecture, context.dtype) | kv_tensors)
            for t, layer in layers.items()
        }


def _copy_vision(context: RunContext, folder: Path) -> list[str]:
    """Copy tower and projector with their configs, from which the vision engine is built."""
    plan = context.plan
    store.save_tensors(read_vision(plan), folder / "model.safetensors")
    store.write_json(folder / "config.json", plan.export_config)
    names = ["model.safetensors", "config.json"]
    for subfolder in _vision_subfolders(context):
        names += copy_missing(plan.folder, folder, subfolder, _is_vision_sidecar)
    return [f"vision/{name}" for name in names]


def _vision_subfolders(context: RunContext) -> list[str]:
    family = context.plan.family
    others = {one for one in family.subfolders if one != family.decoder_subfolder}
    return sorted({"", *others})


def _is_vision_sidecar(path: Path) -> bool:
    return path.name in VISION_SIDECARS
