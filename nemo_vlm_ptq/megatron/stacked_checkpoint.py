"""Writing a torch_dist checkpoint whose layers are stacked along a first axis, as NeMo has them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from nemo_vlm_ptq.megatron.checkpoint import save_state


@dataclass(frozen=True)
class StackedEntry:
    """A whole tensor, or an object, and the layer of it that this is; None: it has no layers."""

    name: str
    value: Any
    layer: int | None = None


def save_stacked(
    tensors: Iterable[StackedEntry], objects: Iterable[StackedEntry], layers: int, folder: Path
) -> None:
    """Write what the ranks bring; no two may bring the same (collective).

    Args:
        tensors: on the CPU.
        objects: bytes that Megatron pickled, uint8 [n], or None.
        layers: of the model.
        folder: exists, and is empty.
    """
    state: dict[str, Any] = {}
    for one in tensors:
        place = () if one.layer is None else ((0, one.layer, layers),)
        state[f"{one.name}/{one.layer}"] = ShardedTensor.from_rank_offsets(
            one.name, one.value, *place, prepend_axis_num=len(place)
        )
    for one in objects:
        shape, offset = ((1,), (0,)) if one.layer is None else ((layers,), (one.layer,))
        state[f"{one.name}/{one.layer}"] = ShardedObject(one.name, one.value, shape, offset)
    save_state(state, folder)
