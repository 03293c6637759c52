"""Write TensorRT-LLM engine checkpoints: llm/ with a file per serving rank, and vision/.

File r belongs to pipeline rank p and tensor rank t of the serving layout, r = p * T + t. One
process writes each rank file, layer by layer.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

from nemo_vlm_ptq.checkpoints.streaming_writer import AddTensors, open_streaming_writer
from nemo_vlm_ptq.context import RunContext, StageOutput
from nemo_vlm_ptq.distributed.layout import round_robin
from nemo_vlm_ptq.formats import KV_CACHES, QuantFormat
from nemo_vlm_ptq.sources.decoder_weights import open_weights, read_vision
from nemo_vlm_ptq.targets.trtllm import tensors as trtllm
from nemo_vlm_ptq.targets.trtllm.config import checkpoint_config
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


def _write_config(context: RunContext, fmt: QuantFormat, folder: Path) -> list[str]:
    plan = context.plan
    export, quantize = plan.recipe.export, plan.recipe.quantize
    config = checkpoint_config(
        plan.family.trtllm_architecture,
        plan.decoder,
        fmt,
        quantize.group_size,
        plan.dtype,
        (export.tensor, export.pipeline),
        KV_CACHES.get(quantize.kv_cache),
    )
    store.write_json(folder / "llm" / "config.json", config)
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
            with encoder.stream():
                architecture, ends = plan.family.trtllm_architecture, encoder.ends((t, T))
                tensors = to_host(trtllm.end_tensors(ends, architecture, (p, P), context.dtype))
            add[t](tensors)
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
    for subfolder in ("", *plan.family.subfolders):
        if subfolder and subfolder == plan.family.decoder_subfolder:
            continue
        names += copy_missing(
            plan.folder, folder, subfolder, lambda path: path.name in VISION_SIDECARS
        )
    return [f"vision/{name}" for name in names]
