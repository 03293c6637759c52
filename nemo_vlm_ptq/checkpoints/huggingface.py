"""Reading a Hugging Face checkpoint: safetensors only, checked before a byte of weights is used."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.parameter_map.entries import published_name

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class SourceTensor:
    """Where a tensor lies on disk; read: reads it whole, where the file is no safetensors."""

    file: Path
    disk_name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Any] | None = None


def model_folder(model: str) -> Path:
    """The folder of a model: itself, or a download of a hub id without anything that runs code.

    Raises:
        UserError: neither a folder nor downloadable.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(f"model folder {model} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        kept = ["*.safetensors", "*.json", "*.model", "*.txt"]
        return Path(snapshot_download(model, allow_patterns=kept))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model {model} is no folder and could not be fetched from the hub: {reason}"
        ) from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: no JSON, or no object.
    """
    try:
        config = json.loads(path.read_text())
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not JSON with an object in it")
    return config


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, with the file's length checked against it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path} is truncated or no safetensors file")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise UserError(f"{path} is truncated or no safetensors file") from None
    try:
        header.pop("__metadata__", None)
        ends = [8 + length]
        for entry in header.values():
            start, end = entry["data_offsets"]
            size_of = DTYPE_BYTES.get(entry["dtype"])
            if size_of and end - start != math.prod(entry["shape"]) * size_of:
                raise ValueError
            ends.append(8 + length + end)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: its header is not of a safetensors file") from None
    if max(ends) != size:
        what = "truncated" if max(ends) > size else "damaged"
        raise UserError(f"{path} is {what}: {size} bytes, its header asks for {max(ends)}")
    return header


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index where it has one."""
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist")
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            pickles = [path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern)]
            if pickles:
                raise UserError(
                    f"{folder} holds {pickles[0]}, a pickle that can run code when loaded; "
                    "convert it to safetensors first"
                )
            raise UserError(f"{folder} holds no .safetensors file")
        return files
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is no index: it needs weight_map, tensor -> file") from None
    for name in names:
        path = folder / name
        if name in outside:
            raise UserError(f"{index} names {name!r}, a file outside the folder")
        if not path.is_file():
            raise UserError(f"{index} names {name!r}, which is not there")
    return [folder / name for name in names]


def list_tensors(
    folder: Path, aliases: Sequence[tuple[str, str]], parts: Sequence[str] = ("",)
) -> dict[str, SourceTensor]:
    """Published name -> place on disk, for every tensor of a checkpoint; reads headers only.

    Args:
        folder: the model folder.
        aliases: (pattern, replacement) that bring any vintage's name to the published one.
        parts: sub-folders that hold a checkpoint each, "" for the folder itself; names in a
            sub-folder are PART/NAME.

    Raises:
        UserError: no folder, no safetensors, a pickle, a truncated shard, a bad index, or two
            tensors that bear the same published name.
    """
    found: dict[str, SourceTensor] = {}
    for part in parts:
        start = f"{part}/" if part else ""
        for path in _files(folder / part):
            for disk_name, entry in read_safetensors_header(path).items():
                name = published_name(start + disk_name, aliases)
                if name in found:
                    first = found[name].disk_name
                    raise UserError(f"{path}: {disk_name} and {first} are both {name}")
                found[name] = SourceTensor(path, disk_name, tuple(entry["shape"]), entry["dtype"])
    return found


def most_common_dtype(tensors: Iterable[SourceTensor]) -> str:
    """The dtype of most weights; norms may have another."""
    counts = Counter[str]()
    for tensor in tensors:
        counts[tensor.dtype] += math.prod(tensor.shape)
    return max(counts, key=lambda dtype: counts[dtype])


class SourceReader:
    """Open safetensors files; `slices(name)` can be cut like a tensor and reads only the cut."""

    def __init__(self, tensors: Mapping[str, SourceTensor], stack: ExitStack) -> None:
        self._tensors = tensors
        self._stack = stack
        self._open: dict[Path, Any] = {}

    def slices(self, name: str) -> Any:
        """A lazily read tensor: `[a:b]` and `[:, a:b]` read those rows or columns."""
        from safetensors import safe_open

        place = self._tensors[name]
        if place.read is not None:
            return place.read()
        if place.file not in self._open:
            handle = safe_open(place.file, framework="pt")
            self._open[place.file] = self._stack.enter_context(handle)
        return self._open[place.file].get_slice(place.disk_name)

    def whole(self, name: str) -> Any:
        """The whole tensor, checked to be finite."""
        return require_finite(self.slices(name)[:], name)


@contextmanager
def open_source(tensors: Mapping[str, SourceTensor]) -> Iterator[SourceReader]:
    """Reader over tensors listed by `list_tensors`; files are opened when first needed."""
    with ExitStack() as stack:
        yield SourceReader(tensors, stack)


def all_finite(tensor: Any) -> bool:
    """No NaN and no Inf, found without a temporary tensor: both reach the extremes."""
    import torch

    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def require_finite(tensor: Any, name: str) -> Any:
    """The tensor itself.

    Raises:
        UserError: it holds NaN or Inf.
    """
    if tensor.is_floating_point() and not all_finite(tensor):
        raise UserError(f"tensor {name} holds NaN or Inf")
    return tensor


def cast_checked(tensor: Any, name: str, dtype: Any) -> Any:
    """The tensor in a dtype.

    Raises:
        UserError: it holds NaN or Inf, or numbers that the dtype cannot hold.
    """
    made = require_finite(tensor, name).to(dtype)
    if not all_finite(made):
        raise UserError(
            f"tensor {name} holds numbers beyond {dtype}'s largest; set export.dtype=bfloat16"
        )
    return made


def total_bytes(tensors: Mapping[str, SourceTensor]) -> int:
    """Bytes of the listed tensors on disk."""
    return sum(math.prod(t.shape) * DTYPE_BYTES.get(t.dtype, 4) for t in tensors.values())
