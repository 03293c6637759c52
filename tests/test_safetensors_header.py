"""Headers of safetensors files are refused where the library refuses them, while planning."""

import json
import struct

import pytest
import safetensors
from bad_models import said_by

from nemo_vlm_ptq.checkpoints.safetensors_header import read_safetensors_header


def header_file(path, entries, data=b"\0" * 8, metadata=None):
    """Write a safetensors file; entries: text of the header, or its content."""
    if not isinstance(entries, str):
        entries = entries | ({} if metadata is None else {"__metadata__": metadata})
        entries = json.dumps(entries)
    path.write_bytes(struct.pack("<Q", len(entries.encode())) + entries.encode() + data)
    return path


def entry(start=0, stop=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


BAD_HEADERS = [
    {"a": entry(), "b": entry()},
    {"a": entry(0, 4, (1,)), "b": entry(2, 6, (1,))},
    {"a": entry(4, 8, (1,))},
    {"a": entry(0, 2, (1,), "F16"), "b": entry(4, 8, (1,))},
    {"a": entry(-8, 0)},
    {"a": entry(0.0, 8)},
    {"a": entry(0, 8.0)},
    {"a": entry(8, 0)},
    {"a": entry(shape=(2.0,))},
    {"a": entry(shape=(-2,))},
    {"a": entry(shape=(-1, -2))},
    {"a": entry(shape=(True, 2))},
    {"a": entry(shape=(2**40, 2**40))},
    {"a": entry(shape=(3,))},
    {"a": entry(dtype="F33")},
    {"a": entry(dtype=3)},
    {"a": entry() | {"shape": 2}},
    {"a": entry() | {"shape": "2"}},
    {"a": entry() | {"data_offsets": [0]}},
    {"a": entry() | {"data_offsets": {"0": 1}}},
    {"a": [1]},
    {"a": {"dtype": "F32", "shape": [2]}},
    '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
]


@pytest.mark.parametrize("content", BAD_HEADERS, ids=range(len(BAD_HEADERS)))
def test_a_header_that_the_library_refuses_is_refused(tmp_path, content):
    path = header_file(tmp_path / "x.safetensors", content)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(path, "pt").__enter__().get_tensor("a")
    assert str(path) in said_by(read_safetensors_header, path)


def test_a_header_with_a_name_twice_is_refused(tmp_path):
    one = json.dumps(entry())
    path = header_file(tmp_path / "x.safetensors", f'{{"a": {one}, "a": {one}}}')
    assert "key 'a' is not unique" in said_by(read_safetensors_header, path)


@pytest.mark.parametrize("metadata", [3, "x", [], {"a": 1}, {"a": {"b": "c"}}, {"a": None}])
def test_odd_metadata_are_refused(tmp_path, metadata):
    path = header_file(tmp_path / "x.safetensors", {"a": entry()}, metadata=metadata)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(path, "pt").__enter__()
    assert "invalid safetensors header" in said_by(read_safetensors_header, path)


def test_headers_that_the_library_takes_are_taken(tmp_path):
    entries = {
        "empty": entry(0, 0, (0, 5)),
        "scalar": entry(0, 4, ()),
        "half": entry(4, 6, (1,), "BF16"),
        "bytes": entry(6, 8, (2,), "F8_E4M3"),
    }
    path = header_file(tmp_path / "x.safetensors", entries, metadata={"format": "pt"})
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == set(entries)
    assert read_safetensors_header(path) == entries


def test_a_header_beyond_the_limit_of_the_library_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 150_000_000) + b"{")
        file.truncate(8 + 150_000_000)
    assert "its header has 150000000 bytes" in said_by(read_safetensors_header, path)
