"""Weights of a NeMo Llava under Hugging Face names: which stored tensor each is a part of.

The family's rows say what belongs together; NeMo stacks layers along a first axis, or stores each
by itself, and keeps a gated linear whole or in halves.
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
from nemo_vlm_ptq.families import llava
from nemo_vlm_ptq.parameter_map.entries import STORED_NORMS, ParameterEntry
from nemo_vlm_ptq.parameter_map.sharding import HeadSizes, unshard_tensor

START, LAYERS = "module.language_model.", "module.language_model.decoder.layers."
EMBEDDING = f"{START}embedding.word_embeddings.weight"
TOWER = "module.vision_model.vision_model."
BESIDE = {
    "module.vision_model.": "vision_tower.",
    "module.vision_projection.0.": "multi_modal_projector.linear_1.",
    "module.vision_projection.2.": "multi_modal_projector.linear_2.",
    "module.vision_projection.encoder.linear_fc1.": "multi_modal_projector.linear_1.",
    "module.vision_projection.encoder.linear_fc2.": "multi_modal_projector.linear_2.",
}
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
Place = tuple[StoredTensor, int | None]  # a stored tensor, and the layer of it where it is stacked


def shape_of(folder: Path, index: Index, name: str) -> tuple[int, ...]:
    """Shape of a stored tensor.

    Raises:
        UserError: it is not there.
    """
    if name not in index.tensors:
        raise UserError(f"{folder}: tensor {name} is missing")
    return index.tensors[name].shape


def count_layers(index: Index) -> int:
    """Layers of the decoder."""
    numbers = [
        int(match[1]) + 1
        for name in index.tensors
        if (match := re.match(rf"{re.escape(LAYERS)}(\d+)\.", name))
    ]
    stacked = [one.shape[0] for name, one in index.tensors.items() if name.startswith(LAYERS)]
    return max(numbers or stacked or [0])


def ffn(folder: Path, index: Index) -> int:
    """Inner features of the MLP."""
    stacked, apart = f"{LAYERS}mlp.linear_fc2.weight", f"{LAYERS}0.mlp.linear_fc2.weight"
    return shape_of(folder, index, stacked if stacked in index.tensors else apart)[-1]


def tower_sizes(folder: Path, index: Index) -> dict[str, int]:
    """Sizes of transformers' CLIP tower.

    Raises:
        UserError: the tower is another.
    """
    if f"{TOWER}embeddings.class_embedding" not in index.tensors:
        raise UserError(
            f"{folder}: the tower is not the one of HFCLIPVisionConfig, which alone is supported"
        )
    places, hidden = shape_of(folder, index, f"{TOWER}embeddings.position_embedding.weight")
    patch = shape_of(folder, index, f"{TOWER}embeddings.patch_embedding.weight")[-1]
    inner = f"{TOWER}encoder.layers."
    layers = {name.removeprefix(inner).split(".")[0] for name in index.tensors if inner in name}
    return {
        "hidden_size": hidden,
        "intermediate_size": shape_of(folder, index, f"{inner}0.mlp.fc1.weight")[0],
        "num_hidden_layers": len(layers),
        "image_size": math.isqrt(places - 1) * patch,
        "patch_size": patch,
    }


def list_tensors(folder: Path, index: Index, config: dict[str, Any]) -> dict[str, SourceTensor]:
    """Published name -> how it is read.

    Raises:
        UserError: a tensor is missing, of another shape than io.json says, or has no place.
    """
    decoder = llava.decoder(config)
    shapes, sizes = decoder.shapes(llava.FAMILY.parameter_map), decoder.sizes(1)
    whole = lru_cache(maxsize=1)(_read)  # q, k and v come from one stored tensor, one by one
    found: dict[str, SourceTensor] = {}
    used: set[str] = set()
    for row, layer in _rows(decoder.layers):
        places = _places(folder, index, row, layer)
        row = row if layer is None else row.for_layer(layer)
        used |= {stored.name for stored, _ in places}
        parts = [shapes[name] for name in row.hf_names]
        _check_shape(folder, places, (sum(part[0] for part in parts), *parts[0][1:]))
        for part, name in enumerate(row.hf_names):
            read = _reader(whole, tuple(places), row, part, sizes)
            found[name] = _tensor(places[0][0], shapes[name], read)
    for name, stored in index.tensors.items():
        for start, published in BESIDE.items():
            if name.startswith(start):
                used.add(name)
                read = _reader(whole, ((stored, None),), None, 0, sizes)
                found[published + name.removeprefix(start)] = _tensor(stored, stored.shape, read)
    extra = sorted(name for name in index.tensors if name.startswith("module."))
    for name in extra:
        if name not in used:
            raise UserError(f"{folder}: tensor {name} has no place in a Llava")
    return found


def _rows(layers: int) -> list[tuple[ParameterEntry, int | None]]:
    rows = llava.FAMILY.parameter_map
    flat: list[tuple[ParameterEntry, int | None]] = [
        (row, None) for row in rows if not row.per_layer
    ]
    return flat + [(row, i) for i in range(layers) for row in rows if row.per_layer]


def _places(folder: Path, index: Index, row: ParameterEntry, layer: int | None) -> list[Place]:
    """Where a row of the decoder lies: in one stored tensor, or in two halves."""
    name = row.megatron_name.removeprefix("decoder.layers.{i}.")
    name = STORED_NORMS.get(name, name)
    starts: list[tuple[str, int | None]] = [(START, None)]
    if layer is not None:
        starts = [(LAYERS, layer), (f"{LAYERS}{layer}.", None)]
    for start, inside in starts:
        for parts in ([name], [f"{name}_w", f"{name}_v"]):
            if all(start + part in index.tensors for part in parts):
                return [(index.tensors[start + part], inside) for part in parts]
    raise UserError(f"{folder}: tensor {starts[-1][0]}{name} is missing")


def _check_shape(folder: Path, places: list[Place], wanted: tuple[int, ...]) -> None:
    """The stored tensors make up what the config asks for."""
    shapes = [stored.shape[0 if layer is None else 1 :] for stored, layer in places]
    have = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if have != wanted:
        raise UserError(
            f"{folder}: tensor {places[0][0].name} has shape {have}, io.json asks for {wanted}"
        )


def _tensor(stored: StoredTensor, shape: tuple[int, ...], read: Callable[[], Any]) -> SourceTensor:
    dtype = DTYPES.get(stored.dtype, str(stored.dtype))
    return SourceTensor(stored.chunks[0].place.file, stored.name, tuple(shape), dtype, read)


def _reader(
    whole: Callable[..., torch.Tensor],
    places: tuple[Place, ...],
    row: ParameterEntry | None,
    part: int,
    sizes: HeadSizes,
) -> Callable[[], torch.Tensor]:
    """What reads one Hugging Face tensor."""

    def read() -> torch.Tensor:
        full = whole(places)
        return full if row is None else unshard_tensor(row.sharding, full, sizes)[part]

    return read


def _read(places: tuple[Place, ...]) -> torch.Tensor:
    parts = [read_tensor(stored, layer) for stored, layer in places]
    return torch.cat(parts) if parts[1:] else parts[0]
