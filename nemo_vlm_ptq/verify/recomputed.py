"""Compare an export with what its writer makes again from the source and the solved scales.

The reference reader shares no arithmetic with the writers, so it allows for rounding. Here every
bit counts: a code, a scale or a key of a config that is not as it was made is found.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from nemo_vlm_ptq import __version__
from nemo_vlm_ptq.input_files import parse_json
from nemo_vlm_ptq.targets.writing.expected import ExpectedExport, FileTensors
from nemo_vlm_ptq.verify.files import check_names

METADATA = {"format": "pt"}  # of every safetensors file; transformers requires it


def compare_export(folder: Path, expected: ExpectedExport) -> tuple[list[str], list[str]]:
    """Return the findings about tensors, and those about all other files."""
    findings, index = compare_tensors(folder, expected.tensors)
    contents = expected.make_json(_full_names(index))
    beside = check_names(folder, {*index, *contents, *expected.copied})
    for name, content in contents.items():
        if (folder / name).is_file():
            beside += compare_json(folder, name, content)
    for name, path in expected.copied.items():
        if (folder / name).is_file() and (folder / name).read_bytes() != path.read_bytes():
            beside.append(f"{name} differs from that of the model")
    return findings, beside


def compare_tensors(
    folder: Path, tensors: Iterable[FileTensors]
) -> tuple[list[str], dict[str, set[str]]]:
    """Compare tensors bit by bit; return the findings, and the tensors' names by file."""
    findings: list[str] = []
    index: dict[str, set[str]] = {}
    with ExitStack() as stack:
        opened: dict[str, Any] = {}
        for file, expected in tensors:
            if file not in opened:
                handle = safe_open(folder / file, framework="pt")
                opened[file] = stack.enter_context(handle)
                index[file] = set()
            index[file] |= set(expected)
            present = set(opened[file].keys())
            for name, tensor in expected.items():
                if name not in present:
                    findings.append(f"{file}: tensor {name} is missing")
                elif problem := _difference(opened[file].get_tensor(name), tensor):
                    findings.append(f"{file}: {name} {problem}")
        for file, handle in opened.items():
            extra = sorted(set(handle.keys()) - index[file])
            findings += [f"{file}: {name} is extra" for name in extra]
            if handle.metadata() != METADATA:
                findings.append(f"{file}: metadata is {handle.metadata()}, expected {METADATA}")
    return findings, index


def _difference(found: torch.Tensor, expected: torch.Tensor) -> str:
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return (
            f"is {found.dtype} {list(found.shape)}, "
            f"expected {expected.dtype} {list(expected.shape)}"
        )
    found_bytes, bytes_ = (one.contiguous().view(-1).view(torch.uint8) for one in (found, expected))
    return "" if torch.equal(found_bytes, bytes_) else "is not what source and scales give"


def _full_names(index: Mapping[str, set[str]]) -> dict[str, str]:
    """Return tensor with the subfolder of its file -> file."""
    return {
        "/".join(filter(None, (file.rpartition("/")[0], name))): file
        for file, names in index.items()
        for name in names
    }


def compare_json(folder: Path, name: str, expected: Any) -> list[str]:
    """Compare a JSON file key by key; a key twice, NaN and Infinity are findings."""
    try:
        actual = parse_json((folder / name).read_bytes())
    except ValueError as error:
        return [f"{name} cannot be read: {error}"]
    return _differences(name, "", actual, json.loads(json.dumps(expected)))


def _differences(file: str, key: str, actual: Any, expected: Any) -> list[str]:
    if isinstance(actual, dict) and isinstance(expected, dict):
        findings = []
        for name in sorted({*actual, *expected}):
            path = f"{key}.{name}".lstrip(".")
            if name not in expected:
                findings.append(f"{file}: unknown key {path}")
            elif name not in actual:
                findings.append(f"{file}: {path} is missing")
            else:
                findings += _differences(file, path, actual[name], expected[name])
        return findings
    # The package may have had another version when it wrote the file.
    is_version = expected == __version__ and key.endswith("version") and isinstance(actual, str)
    if is_version or json.dumps(actual) == json.dumps(expected):  # 1, 1.0 and true differ
        return []
    return [f"{file}: {key} is {reprlib.repr(actual)}, expected {reprlib.repr(expected)}"]
