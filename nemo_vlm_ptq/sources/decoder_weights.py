"""Megatron parameters of the decoder, read from the source checkpoint whenever they are needed.

No copy of the model is written: the parameter map converts each parameter in memory, and the page
cache serves the second reader. Tensors are cast to the model's dtype and checked while they are
read. Merging and splitting runs on the device.

Legend: t tensor-parallel rank, T tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_vlm_ptq.checkpoints.huggingface import (
    SourceReader,
    all_finite,
    cast_checked,
    open_source,
)
from nemo_vlm_ptq.constants import VOCAB_MULTIPLE
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.parameter_map.entries import ParameterEntry, expand_layers
from nemo_vlm_ptq.parameter_map.sharding import shard_tensor
from nemo_vlm_ptq.utils.pinned_memory import to_device

if TYPE_CHECKING:
    from nemo_vlm_ptq.planning.plan import Plan


@dataclass(frozen=True, kw_only=True)
class _DeviceSlices:
    """A lazy tensor whose slices are copied to a device."""

    whole: Any
    device: torch.device

    def get_shape(self) -> list[int]:
        """Return the shape, like a safetensors slice."""
        whole = self.whole
        return list(whole.shape if isinstance(whole, torch.Tensor) else whole.get_shape())

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Read a slice to the device."""
        return to_device(self.whole[index], self.device)


class DecoderWeights:
    """Reader of the decoder's parameters by Megatron name.

    Args:
        plan: names the source's tensors, the parameter map and the dtype.
        reader: the open source.
        device: device of the results.
    """

    def __init__(self, plan: Plan, reader: SourceReader, device: torch.device) -> None:
        entries = expand_layers(plan.parameter_map, range(plan.decoder.layers))
        self._entries = {entry.megatron_name: entry for entry in entries}
        self._decoder = plan.decoder
        self._dtype: torch.dtype = getattr(torch, plan.dtype)
        self._reader, self._device = reader, device

    def shard(self, name: str, t: int = 0, T: int = 1, *, by_output: bool = False) -> torch.Tensor:
        """Return shard t of T of a parameter, reading only its slices.

        Args:
            name: Megatron name.
            t: tensor-parallel rank.
            T: tensor-parallel size.
            by_output: shard row-parallel linears along their outputs, as the model for calibration
                does.

        Raises:
            UserError: NaN or Inf, or values outside of the range of the dtype.
        """
        entry = self._entries[name]
        parts = [self._reader.get_slice(hf_name) for hf_name in entry.hf_names]
        slices = [_DeviceSlices(whole=part, device=self._device) for part in parts]
        sharding = "column" if by_output and entry.sharding == "row" else entry.sharding
        sizes = self._decoder.sizes(VOCAB_MULTIPLE, entry.first_layer)
        shard = shard_tensor(sharding, slices, sizes, t, T)
        if not entry.keeps_dtype:
            shard = shard.to(self._dtype)
        if not all_finite(shard):
            self._raise_not_finite(entry, parts)
        return shard

    def __contains__(self, name: str) -> bool:
        """Return whether the decoder has a parameter."""
        return name in self._entries

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return whole parameters by name.

        Raises:
            UserError: see `shard`.
        """
        return {name: self.shard(name) for name in names}

    def _raise_not_finite(self, entry: ParameterEntry, parts: list[Any]) -> None:
        for part, name in zip(parts, entry.hf_names, strict=True):
            cast_checked(part[:], name, self._dtype)  # raises with the tensor's name


@contextmanager
def open_weights(plan: Plan, device: torch.device) -> Iterator[DecoderWeights]:
    """Open the decoder's parameters; files are opened on first use.

    Raises:
        UserError: at the end, if a file was changed in between.
    """
    files = {tensor.file for tensor in plan.tensors.values()}
    before = {path: _stamp(path) for path in files}
    with open_source(plan.tensors) as reader:
        yield DecoderWeights(plan, reader, device)
    changed = sorted(path for path in files if _stamp(path) != before[path])
    if changed:
        raise UserError(f"{changed[0]} was changed while it was read; run the command again")


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return size and time of a file, None if it is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def read_vision(plan: Plan) -> dict[str, torch.Tensor]:
    """Read the tensors beside the decoder, tower and projector above all, cast, sorted by name.

    Raises:
        UserError: NaN or Inf, or values outside of the range of the dtype.
    """
    dtype = getattr(torch, plan.dtype)
    with open_source(plan.tensors) as reader:
        return {
            name: cast_checked(reader.get_tensor(name), name, dtype)
            for name in sorted(plan.vision_names)
        }
