"""Headers of safetensors files, checked as the library checks them.

A header that the library rejects is rejected here as well: while planning, not in the middle of a
run.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.input_files import open_file, parse_json

MAX_HEADER_BYTES = 100_000_000  # the library's limit
MAX_DIMENSIONS = 16
DTYPE_BITS = (
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8)
    | dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
    | dict.fromkeys(("I32", "U32", "F32"), 32)
    | dict.fromkeys(("I64", "U64", "F64", "C64"), 64)
)


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Read the JSON header of a safetensors file and validate the file's size against it.

    Returns:
        Tensor name -> {"dtype", "shape", "data_offsets"}.

    Raises:
        UserError: the file is truncated, damaged or of another format.
    """
    with open_file(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path} is truncated or not a safetensors file")
        if length > MAX_HEADER_BYTES:
            raise UserError(
                f"{path} is damaged: its header has {length} bytes, supported: {MAX_HEADER_BYTES}"
            )
        content = file.read(length)
    try:
        header = parse_json(content)
    except ValueError as error:
        if "is not unique" in str(error):
            raise UserError(f"{path} is damaged: invalid safetensors header: {error}") from None
        raise UserError(f"{path} is truncated or not a safetensors file") from None
    try:
        _check_metadata(header.pop("__metadata__", None))
        end = _check_entries(header)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: invalid safetensors header") from None
    if 8 + length + end != size:
        problem = "truncated" if 8 + length + end > size else "damaged"
        raise UserError(f"{path} is {problem}: {size} bytes, its header expects {8 + length + end}")
    return header


def _check_metadata(metadata: Any) -> None:
    """Require a flat object of strings, or null."""
    if metadata is not None and not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError


def _check_entries(header: dict[str, Any]) -> int:
    """Check dtypes, shapes and offsets; the tensors' bytes must follow each other without holes.

    Returns:
        The end of the last tensor, in bytes.

    Raises:
        ValueError, TypeError, KeyError: an entry is invalid.
    """
    end = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        (start, stop), shape = entry["data_offsets"], entry["shape"]
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
            raise ValueError
        if any(type(number) is not int or number < 0 for number in (start, stop, *shape)):
            raise ValueError
        bits = math.prod(shape) * DTYPE_BITS[entry["dtype"]]
        if start != end or bits % 8 or stop - start != bits // 8:
            raise ValueError
        end = stop
    return end
