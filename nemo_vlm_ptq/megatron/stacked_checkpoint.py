"""Write torch_dist checkpoints in NeMo's format, where layers are stacked along a first axis."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from nemo_vlm_ptq.megatron.checkpoint import save_sharded_state


@dataclass(frozen=True)
class StackedEntry:
    """One layer's unsharded tensor or object under a stacked name; layer None: not stacked."""

    name: str
    value: Any
    layer: int | None = None


def save_stacked(
    tensors: Iterable[StackedEntry], objects: Iterable[StackedEntry], layers: int, folder: Path
) -> None:
    """Write the entries of all ranks; each entry must come from exactly one rank (collective).

    Args:
        tensors: CPU tensors.
        objects: uint8 tensors [n] pickled by Megatron, or None.
        layers: number of layers of the model.
        folder: an existing, empty folder.
    """
    state: dict[str, Any] = {}
    for entry in tensors:
        offsets = () if entry.layer is None else ((0, entry.layer, layers),)
        state[f"{entry.name}/{entry.layer}"] = ShardedTensor.from_rank_offsets(
            entry.name, entry.value, *offsets, prepend_axis_num=len(offsets)
        )
    for entry in objects:
        shape, offset = ((1,), (0,)) if entry.layer is None else ((layers,), (entry.layer,))
        state[f"{entry.name}/{entry.layer}"] = ShardedObject(entry.name, entry.value, shape, offset)
    save_sharded_state(state, folder)
