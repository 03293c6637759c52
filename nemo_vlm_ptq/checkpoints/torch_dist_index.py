"""Reader of the index of torch_dist checkpoints, without Megatron and without running pickled code.

`.metadata` is a pickle from an untrusted source. It is read by an unpickler that is limited to the
metadata classes of `torch.distributed.checkpoint`. The byte ranges of tensors in .distcp files are
loaded with `torch.load(weights_only=True)`.
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
# Raised by unpickling bytes that are not a pickle, or a pickle of other classes.
UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
)


class _Unused:
    """Placeholder of a record about how a checkpoint was written, which reading does not need."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        """Accept a call in place of a function that was pickled."""


def _member(record: Any, name: str) -> Any:
    """Resolve the `getattr` by which some releases of Python 3.11 pickle members of enums."""
    if record is _Unused:
        return _Unused()
    if isinstance(record, type) and issubclass(record, Enum):
        return record[name]
    raise pickle.UnpicklingError(f"unsupported attribute {name} of {record!r}")


METADATA_MODULE = "torch.distributed.checkpoint.metadata"
ALLOWED_GLOBALS: dict[tuple[str, str], Any] = {
    **{
        (METADATA_MODULE, name): getattr(records, name)
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
IGNORED_GLOBALS = {
    ("torch.distributed.checkpoint.planner", name)
    for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType", "BytesIOWriteData")
} | {
    ("megatron.core.dist_checkpointing.strategies.torch", name)
    for name in ("MCoreMetadata", "MCoreSavePlan")
}


class _RestrictedUnpickler(pickle.Unpickler):
    """Unpickler of the metadata classes of torch's distributed checkpoints alone."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in IGNORED_GLOBALS:
            return _Unused
        if (module, name) in ALLOWED_GLOBALS:
            return ALLOWED_GLOBALS[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"unsupported global {module}.{name}")


@dataclass(frozen=True)
class ByteRange:
    """Range of `length` bytes of a file, starting at `offset`."""

    file: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """Block of a stored tensor: the index of its first element, its shape and its bytes."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    byte_range: ByteRange


@dataclass(frozen=True)
class StoredTensor:
    """Tensor of a torch_dist checkpoint and the chunks that it was written in."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Index:
    """Contents of a torch_dist checkpoint, by stored name."""

    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, ByteRange]


def read_index(folder: Path) -> Index:
    """Read the index of a torch_dist checkpoint, but no tensor.

    Raises:
        UserError: the index is missing or damaged, refers to other classes than torch's metadata,
            or names bytes that do not exist.
    """
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{folder} is not a torch_dist checkpoint: {INDEX} is missing")
    try:
        with path.open("rb") as file:
            metadata = _RestrictedUnpickler(file).load()
        return _make_index(folder, metadata)
    except UNPICKLING_ERRORS as error:
        raise UserError(f"{path} is damaged or not a torch_dist index: {error}") from None


def _make_index(folder: Path, metadata: records.Metadata) -> Index:
    """Convert torch's metadata into an index."""
    ranges: dict[tuple[str, tuple[int, ...] | None], ByteRange] = {}
    for key, info in metadata.storage_data.items():
        start = None if key.offset is None else tuple(key.offset)
        ranges[key.fqn, start] = _byte_range(folder, info)
    tensors, objects = {}, {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, records.TensorStorageMetadata):
            objects[name] = ranges[name, None]
            continue
        chunks = tuple(
            Chunk(
                start=tuple(chunk.offsets),
                shape=tuple(chunk.sizes),
                byte_range=ranges[name, tuple(chunk.offsets)],
            )
            for chunk in entry.chunks
        )
        tensors[name] = StoredTensor(name, tuple(entry.size), entry.properties.dtype, chunks)
    return Index(tensors, objects)


def _byte_range(folder: Path, info: Any) -> ByteRange:
    """Return the bytes that a storage record names, after checking that they exist."""
    file = folder / info.relative_path
    if Path(info.relative_path).name != info.relative_path:
        raise UserError(f"{folder}/{INDEX} names {info.relative_path!r}, a file outside the folder")
    if not file.is_file():
        raise UserError(f"{folder}/{INDEX} names {info.relative_path!r}, which does not exist")
    if getattr(info, "transform_descriptors", None):
        raise UserError(f"{file} is compressed; save the checkpoint without transforms")
    if file.stat().st_size < info.offset + info.length:
        raise UserError(
            f"{file} is truncated: {file.stat().st_size} bytes, "
            f"{INDEX} expects {info.offset + info.length}"
        )
    return ByteRange(file, offset=info.offset, length=info.length)


class _FileView(io.RawIOBase):
    """Read-only file over a byte range of another; torch reads from it directly into tensors."""

    def __init__(self, file: io.FileIO, byte_range: ByteRange) -> None:
        self._file, self._position = file, 0
        self._start, self._length = byte_range.offset, byte_range.length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = min(max(0, base + offset), self._length)
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._position)
        target = memoryview(buffer).cast("B")[: self._length - self._position]
        done = 0
        while done < len(target) and (count := self._file.readinto(target[done:])):
            done += count  # the system reads at most 2 GB per call
        self._position += done
        return done


def load_range(byte_range: ByteRange) -> Any:
    """Load what torch saved in a byte range, limited to plain values and tensors.

    Raises:
        UserError: the bytes are damaged or hold other types.
    """
    try:
        with byte_range.file.open("rb", buffering=0) as file:
            view: Any = _FileView(file, byte_range)
            return torch.load(view, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{byte_range.file} is damaged at byte {byte_range.offset}: {reason}"
        ) from None


def read_object(index: Index, name: str) -> Any:
    """Load an object that is not a tensor, limited to plain values and tensors.

    Megatron stores such an object as a tensor of bytes that holds a second pickle.

    Raises:
        UserError: the bytes are damaged or hold other types.
    """
    byte_range = index.objects[name]
    found = load_range(byte_range)
    if isinstance(found, list) and len(found) == 1:
        (found,) = found
    if isinstance(found, torch.Tensor) and found.dtype == torch.uint8 and found.numel():
        try:
            return torch.load(io.BytesIO(found.numpy().tobytes()), weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{byte_range.file}: object {name} is damaged: {reason}") from None
    return found
