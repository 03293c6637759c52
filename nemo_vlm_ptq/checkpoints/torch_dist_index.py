"""Reading torch_dist folders without Megatron, and without running anything that lies in them.

`.metadata` is a pickle that may come from anybody: it is read by an unpickler that knows the
records of torch's distributed checkpoints and nothing else. Tensors lie in .distcp files at stated
places and are loaded with torch's own restricted loader.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as records

from nemo_vlm_ptq.errors import UserError

INDEX = ".metadata"
# What unpickling raises on bytes that are no pickle, or one of something else.
DAMAGE = (pickle.UnpicklingError, AttributeError, EOFError, LookupError, TypeError, ValueError)


class _Unused:
    """What is told of how a checkpoint was written, which no reader needs."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        """An unused function."""


def _member(record: Any, name: str) -> Any:
    """`getattr` of an index: how some releases of Python 3.11 pickle members of enumerations."""
    if record is _Unused:
        return _Unused()
    if isinstance(record, type) and issubclass(record, Enum):
        return record[name]
    raise pickle.UnpicklingError(f"it asks for {name} of {record!r}")


METADATA = "torch.distributed.checkpoint.metadata"
KNOWN: dict[tuple[str, str], Any] = {
    **{
        (METADATA, name): getattr(records, name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
            "StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): dict,
    ("builtins", "getattr"): _member,
}  # fmt: skip
UNUSED = {
    ("torch.distributed.checkpoint.planner", name)
    for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType", "BytesIOWriteData")
} | {
    ("megatron.core.dist_checkpointing.strategies.torch", name)
    for name in ("MCoreMetadata", "MCoreSavePlan")
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in UNUSED:
            return _Unused
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


@dataclass(frozen=True)
class ByteRange:
    """Where bytes lie: `length` bytes of a file from `offset`."""

    file: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A block of a stored tensor: its first element's index, its shape, and its bytes."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    place: ByteRange


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a torch_dist folder, in the chunks that were written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Index:
    """What a torch_dist folder holds, by stored name."""

    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, ByteRange]


def read_index(folder: Path) -> Index:
    """The index of a torch_dist folder; no tensor is read.

    Raises:
        UserError: no index, one that asks for more than torch's records, or bytes that are not
            where it says.
    """
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{folder} is no torch_dist checkpoint: it has no {INDEX}")
    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
        return _index(folder, found)
    except DAMAGE as error:
        raise UserError(f"{path} is damaged or no index of tensors: {error}") from None


def _index(folder: Path, found: records.Metadata) -> Index:
    places: dict[tuple[str, tuple[int, ...] | None], ByteRange] = {}
    for key, info in found.storage_data.items():
        start = None if key.offset is None else tuple(key.offset)
        places[key.fqn, start] = _place(folder, info)
    tensors, objects = {}, {}
    for name, entry in found.state_dict_metadata.items():
        if not isinstance(entry, records.TensorStorageMetadata):
            objects[name] = places[name, None]
            continue
        chunks = tuple(
            Chunk(tuple(one.offsets), tuple(one.sizes), places[name, tuple(one.offsets)])
            for one in entry.chunks
        )
        tensors[name] = StoredTensor(name, tuple(entry.size), entry.properties.dtype, chunks)
    return Index(tensors, objects)


def _place(folder: Path, info: Any) -> ByteRange:
    file = folder / info.relative_path
    if Path(info.relative_path).name != info.relative_path:
        raise UserError(f"{folder}/{INDEX} names {info.relative_path!r}, outside of the folder")
    if not file.is_file():
        raise UserError(f"{folder}/{INDEX} names {info.relative_path!r}, which is not there")
    if getattr(info, "transform_descriptors", None):
        raise UserError(f"{file} is compressed; save the checkpoint without transforms")
    if file.stat().st_size < info.offset + info.length:
        raise UserError(
            f"{file} is truncated: {file.stat().st_size} bytes, "
            f"{INDEX} asks for {info.offset + info.length}"
        )
    return ByteRange(file, info.offset, info.length)


class _View(io.RawIOBase):
    """Some bytes of a file as a file of their own: torch reads them straight into the tensor."""

    def __init__(self, file: io.FileIO, place: ByteRange) -> None:
        self._file, self._start, self._length, self._at = file, place.offset, place.length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = min(max(0, base + offset), self._length)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        wanted = memoryview(buffer).cast("B")[: self._length - self._at]
        done = 0
        while done < len(wanted) and (more := self._file.readinto(wanted[done:])):
            done += more  # the system reads at most 2 GB at once
        self._at += done
        return done


def load_range(place: ByteRange) -> Any:
    """What torch saved somewhere, made of plain values and tensors alone.

    Raises:
        UserError: damaged, or made of anything else.
    """
    try:
        with place.file.open("rb", buffering=0) as file:
            view: Any = _View(file, place)
            return torch.load(view, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{place.file} is damaged at byte {place.offset}: {reason}") from None


def read_object(index: Index, name: str) -> Any:
    """What lies under a name beside the tensors, made of plain values and tensors alone.

    Megatron pickles it once more, into bytes.

    Raises:
        UserError: damaged, or made of anything else.
    """
    found = load_range(index.objects[name])
    if isinstance(found, list) and len(found) == 1:
        (found,) = found
    if isinstance(found, torch.Tensor) and found.dtype == torch.uint8 and found.numel():
        place = index.objects[name]
        try:
            return torch.load(io.BytesIO(found.numpy().tobytes()), weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{place.file} holds a damaged {name}: {reason}") from None
    return found
