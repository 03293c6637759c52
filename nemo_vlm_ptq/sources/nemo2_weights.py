"""Map the weights of a NeMo 2 Llava to Hugging Face names, and read them on demand.

The parameter map of the llava family lists the Hugging Face tensors of each Megatron tensor. NeMo
either stacks layers along a first axis or stores each separately, and stores a gated linear as one
tensor or as two halves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq.checkpoints.huggingface import SourceTensor
from nemo_vlm_ptq.checkpoints.torch_dist_index import Index, StoredTensor
from nemo_vlm_ptq.checkpoints.torch_dist_tensors import read_tensor
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families import Decoder, llava
from nemo_vlm_ptq.parameter_map.entries import ParameterEntry
from nemo_vlm_ptq.parameter_map.sharding import HeadSizes, unshard_tensor

DECODER_PREFIX = "module.language_model."
LAYERS_PREFIX = f"{DECODER_PREFIX}decoder.layers."
EMBEDDING = f"{DECODER_PREFIX}embedding.word_embeddings.weight"
TOWER_PREFIX = "module.vision_model.vision_model."
VISION_PREFIXES = {
    "module.vision_model.": "vision_tower.",
    "module.vision_projection.0.": "multi_modal_projector.linear_1.",
    "module.vision_projection.2.": "multi_modal_projector.linear_2.",
    "module.vision_projection.encoder.linear_fc1.": "multi_modal_projector.linear_1.",
    "module.vision_projection.encoder.linear_fc2.": "multi_modal_projector.linear_2.",
}
# Local-spec name -> name in torch_dist checkpoints, where Megatron stores a norm under the linear
# that follows it, so that fused (TransformerEngine) and local layers share checkpoints.
STORED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
Location = tuple[StoredTensor, int | None]  # stored tensor, and layer index if it is stacked


def shape_of(folder: Path, index: Index, name: str) -> tuple[int, ...]:
    """Return the shape of a stored tensor.

    Raises:
        UserError: the tensor is missing.
    """
    if name not in index.tensors:
        raise UserError(f"{folder}: tensor {name} is missing")
    return index.tensors[name].shape


def count_layers(index: Index) -> int:
    """Return the number of decoder layers."""
    separate = [
        int(match[1]) + 1
        for name in index.tensors
        if (match := re.match(rf"{re.escape(LAYERS_PREFIX)}(\d+)\.", name))
    ]
    stacked = [
        tensor.shape[0] for name, tensor in index.tensors.items() if name.startswith(LAYERS_PREFIX)
    ]
    return max(separate or stacked or [0])


def ffn_size(folder: Path, index: Index) -> int:
    """Return the intermediate size of the MLP."""
    stacked, separate = (f"{LAYERS_PREFIX}{layer}mlp.linear_fc2.weight" for layer in ("", "0."))
    return shape_of(folder, index, stacked if stacked in index.tensors else separate)[-1]


def tower_sizes(folder: Path, index: Index) -> dict[str, int]:
    """Return the sizes of transformers' CLIP tower by their config keys.

    Raises:
        UserError: the vision tower is not transformers' CLIP.
    """
    if f"{TOWER_PREFIX}embeddings.class_embedding" not in index.tensors:
        raise UserError(
            f"{folder}: unsupported vision tower; supported: HFCLIPVisionConfig (CLIP of "
            "transformers)"
        )
    positions, hidden = shape_of(
        folder, index, f"{TOWER_PREFIX}embeddings.position_embedding.weight"
    )
    patch = shape_of(folder, index, f"{TOWER_PREFIX}embeddings.patch_embedding.weight")[-1]
    prefix = f"{TOWER_PREFIX}encoder.layers."
    layers = {name.removeprefix(prefix).split(".")[0] for name in index.tensors if prefix in name}
    return {
        "hidden_size": hidden,
        "intermediate_size": shape_of(folder, index, f"{prefix}0.mlp.fc1.weight")[0],
        "num_hidden_layers": len(layers),
        "image_size": math.isqrt(positions - 1) * patch,
        "patch_size": patch,
    }


def list_tensors(folder: Path, index: Index, config: dict[str, Any]) -> dict[str, SourceTensor]:
    """Return all tensors by published name; their weights are read when they are used.

    Args:
        folder: the checkpoint, for messages.
        index: of its weights.
        config: contents of an equivalent Hugging Face config.json.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape than `config` implies.
    """
    decoder = llava.decoder(config)
    shapes, sizes = decoder.shapes(llava.FAMILY.parameter_map(decoder)), decoder.sizes(1)
    # q, k and v are read one after the other from one stored tensor.
    read_cached = lru_cache(maxsize=1)(_read)
    tensors: dict[str, SourceTensor] = {}
    used: set[str] = set()
    for pattern, layer in _entries(decoder):
        locations = _locate(folder, index, pattern, layer)
        entry = pattern if layer is None else pattern.for_layer(layer)
        used |= {stored.name for stored, _ in locations}
        parts = [shapes[name] for name in entry.hf_names]
        _check_shape(folder, locations, (sum(part[0] for part in parts), *parts[0][1:]))
        for part, name in enumerate(entry.hf_names):
            read = _reader(read_cached, tuple(locations), entry, part, sizes)
            tensors[name] = _source_tensor(locations[0][0], shapes[name], read)
    for name, stored in index.tensors.items():
        for prefix, published in VISION_PREFIXES.items():
            if name.startswith(prefix):
                used.add(name)
                read = _reader(read_cached, ((stored, None),), None, 0, sizes)
                published_name = published + name.removeprefix(prefix)
                tensors[published_name] = _source_tensor(stored, stored.shape, read)
    for name in sorted(index.tensors):
        if name.startswith("module.") and name not in used:
            raise UserError(f"{folder}: unexpected tensor {name}")
    return tensors


def _entries(decoder: Decoder) -> list[tuple[ParameterEntry, int | None]]:
    """Return the entries of the parameter map with their layer, without the layer filled in."""
    entries = llava.FAMILY.parameter_map(decoder)
    non_layer: list[tuple[ParameterEntry, int | None]] = [
        (entry, None) for entry in entries if not entry.per_layer
    ]
    per_layer = [entry for entry in entries if entry.per_layer]
    return non_layer + [(entry, i) for i in range(decoder.layers) for entry in per_layer]


def _locate(folder: Path, index: Index, entry: ParameterEntry, layer: int | None) -> list[Location]:
    """Find the stored tensors of an entry: one tensor, or two halves of a gated linear."""
    name = entry.megatron_name.removeprefix("decoder.layers.{i}.")
    name = STORED_NORMS.get(name, name)
    candidates: list[tuple[str, int | None]] = [(DECODER_PREFIX, None)]
    if layer is not None:
        candidates = [(LAYERS_PREFIX, layer), (f"{LAYERS_PREFIX}{layer}.", None)]
    for prefix, stack_index in candidates:
        for parts in ([name], [f"{name}_w", f"{name}_v"]):
            if all(prefix + part in index.tensors for part in parts):
                return [(index.tensors[prefix + part], stack_index) for part in parts]
    raise UserError(f"{folder}: tensor {candidates[-1][0]}{name} is missing")


def _check_shape(folder: Path, locations: list[Location], expected: tuple[int, ...]) -> None:
    """Check that the stored tensors have the shape that the config implies."""
    shapes = [stored.shape[0 if layer is None else 1 :] for stored, layer in locations]
    shape = (sum(part[0] for part in shapes), *shapes[0][1:])
    if shape != expected:
        raise UserError(
            f"{folder}: tensor {locations[0][0].name} must have shape {expected} according to "
            f"io.json, got {shape}"
        )


def _source_tensor(
    stored: StoredTensor, shape: tuple[int, ...], read: Callable[[], Any]
) -> SourceTensor:
    return SourceTensor(
        file=stored.chunks[0].byte_range.file,
        disk_name=stored.name,
        shape=tuple(shape),
        dtype=DTYPES.get(stored.dtype, str(stored.dtype)),
        read=read,
    )


def _reader(
    read_whole: Callable[..., torch.Tensor],
    locations: tuple[Location, ...],
    entry: ParameterEntry | None,
    part: int,
    sizes: HeadSizes,
) -> Callable[[], torch.Tensor]:
    """Return a function that reads one Hugging Face tensor: part `part` of the entry's tensor."""

    def read() -> torch.Tensor:
        tensor = read_whole(locations)
        return tensor if entry is None else unshard_tensor(entry.sharding, tensor, sizes)[part]

    return read


def _read(locations: tuple[Location, ...]) -> torch.Tensor:
    parts = [read_tensor(stored, layer) for stored, layer in locations]
    return torch.cat(parts) if parts[1:] else parts[0]
