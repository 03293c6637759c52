"""Reader of Hugging Face checkpoints.

Only safetensors files are accepted, because loading a pickle can run code. Headers and file sizes
are validated first, so that a damaged checkpoint is reported before any weight is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from nemo_vlm_ptq.checkpoints.model_folder import is_weight_file
from nemo_vlm_ptq.checkpoints.safetensors_header import DTYPE_BITS, read_safetensors_header
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.input_files import is_file, is_folder, one_line, read_json, shorten
from nemo_vlm_ptq.parameter_map.entries import published_name

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Nothing that can run code.
DOWNLOAD_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class SourceTensor:
    """Location, shape and safetensors dtype of one tensor of a checkpoint.

    read: returns the whole tensor; set for files that are not safetensors.
    """

    file: Path
    disk_name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Any] | None = None


def resolve_model_folder(model: str) -> Path:
    """Return the folder of a model, downloading it if `model` is a Hugging Face Hub id.

    Raises:
        UserError: `model` is neither a folder nor downloadable.
    """
    folder = Path(model)
    if is_folder(folder):
        return folder
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(f"model folder {shorten(model)} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(DOWNLOAD_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = one_line(error)
        raise UserError(
            f"model {shorten(model)} is not a folder and could not be downloaded from the Hub: "
            f"{reason}"
        ) from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        UserError: the file is not valid JSON, or holds another type.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        found = type(config).__name__
        raise UserError(f"{path} is not valid JSON: expected an object, got {found}")
    return config


def _safetensors_files(folder: Path) -> list[Path]:
    """List the safetensors files of a folder in the order of transformers.

    model.safetensors comes first, then the files of the index. Without either, all are taken but
    those that readers ignore.
    """
    if not is_folder(folder):
        raise UserError(f"model folder {folder} does not exist")
    if is_file(folder / SINGLE_FILE):
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if index.exists():
        return _indexed_files(index)
    files = [path for path in sorted(folder.glob("*.safetensors")) if is_weight_file(path)]
    if not files:
        pickles = [path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern)]
        if pickles:
            raise UserError(
                f"{folder} holds {pickles[0]}, a pickle that can run code when loaded; "
                "convert it to safetensors first"
            )
        raise UserError(f"{folder} holds no .safetensors file")
    return files


def _indexed_files(index: Path) -> list[Path]:
    """List the files named by an index, all of which must exist in its folder."""
    try:
        names = sorted(set(read_json_object(index)["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{index} is not a checkpoint index: weight_map, tensor name -> file name, "
            "is missing or invalid"
        ) from None
    for name in names:
        if name in outside:
            raise UserError(f"{index} names {shorten(name)!r}, a file outside the folder")
        if not is_file(index.parent / name):
            raise UserError(f"{index} names {shorten(name)!r}, which does not exist")
    return [index.parent / name for name in names]


def list_tensors(
    folder: Path, aliases: Sequence[tuple[str, str]], subfolders: Sequence[str] = ("",)
) -> dict[str, SourceTensor]:
    """List every tensor of a checkpoint by its published name; read headers only.

    Args:
        folder: the model folder.
        aliases: (pattern, replacement) pairs that map older tensor names to published ones.
        subfolders: sub-folders that hold a checkpoint each, "" for the folder itself. Tensors of
            a sub-folder are named SUBFOLDER/NAME.

    Raises:
        UserError: the folder or its safetensors files are missing, it holds a pickle, a shard is
            truncated, the index is invalid, or two tensors have the same published name.
    """
    tensors: dict[str, SourceTensor] = {}
    for subfolder in subfolders:
        prefix = f"{subfolder}/" if subfolder else ""
        for path in _safetensors_files(folder / subfolder):
            for disk_name, entry in read_safetensors_header(path).items():
                name = published_name(prefix + disk_name, aliases)
                if name in tensors:
                    first = tensors[name].disk_name
                    raise UserError(
                        f"{path}: tensors {disk_name} and {first} have the same name {name}"
                    )
                tensors[name] = SourceTensor(
                    file=path,
                    disk_name=disk_name,
                    shape=tuple(entry["shape"]),
                    dtype=entry["dtype"],
                )
    return tensors


def most_common_dtype(tensors: Iterable[SourceTensor]) -> str:
    """Return the dtype with the most elements; norms may have another."""
    counts = Counter[str]()
    for tensor in tensors:
        counts[tensor.dtype] += math.prod(tensor.shape)
    return max(counts, key=lambda dtype: counts[dtype])


class SourceReader:
    """Lazy reader of the tensors of a checkpoint."""

    def __init__(self, tensors: Mapping[str, SourceTensor], stack: ExitStack) -> None:
        self._tensors = tensors
        self._stack = stack
        self._open: dict[Path, Any] = {}
        self._lock = Lock()  # several threads read

    def get_slice(self, name: str) -> Any:
        """Return a lazy tensor: indexing it with `[a:b]` or `[:, a:b]` reads only that slice."""
        from safetensors import safe_open

        tensor = self._tensors[name]
        if tensor.read is not None:
            return tensor.read()
        with self._lock:
            if tensor.file not in self._open:
                handle = safe_open(tensor.file, framework="pt")
                self._open[tensor.file] = self._stack.enter_context(handle)
        return self._open[tensor.file].get_slice(tensor.disk_name)

    def get_tensor(self, name: str) -> Any:
        """Return the whole tensor.

        Raises:
            UserError: the tensor holds NaN or Inf.
        """
        return require_finite(self.get_slice(name)[:], name)


@contextmanager
def open_source(tensors: Mapping[str, SourceTensor]) -> Iterator[SourceReader]:
    """Open a reader of the tensors that `list_tensors` found; files are opened on first use."""
    with ExitStack() as stack:
        yield SourceReader(tensors, stack)


def all_finite(tensor: Any) -> bool:
    """Return whether a tensor holds neither NaN nor Inf.

    Both propagate to the minimum or maximum, so that no temporary of the tensor's size is needed.
    """
    import torch

    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def require_finite(tensor: Any, name: str) -> Any:
    """Return the tensor unchanged.

    Raises:
        UserError: the tensor holds NaN or Inf.
    """
    if tensor.is_floating_point() and not all_finite(tensor):
        raise UserError(f"tensor {name} holds NaN or Inf")
    return tensor


def cast_checked(tensor: Any, name: str, dtype: Any) -> Any:
    """Return the tensor cast to a dtype.

    Raises:
        UserError: the tensor holds NaN or Inf, or values beyond the range of the dtype.
    """
    cast = require_finite(tensor, name).to(dtype)
    if not all_finite(cast):
        raise UserError(
            f"tensor {name} holds values beyond the range of {dtype}; set export.dtype=bfloat16"
        )
    return cast


def total_bytes(tensors: Mapping[str, SourceTensor]) -> int:
    """Return the number of bytes of the tensors on disk."""
    return sum(math.prod(t.shape) * DTYPE_BITS.get(t.dtype, 32) // 8 for t in tensors.values())
