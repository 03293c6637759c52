"""Open and read files that a user names, with one line about whatever is wrong with them.

A file of a downloaded folder may be anything: a FIFO, on which open() waits forever, a device, a
loop of links, or the pointer that git leaves in place of a large file.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import IO, Any, NoReturn

from nemo_vlm_ptq.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def is_file(path: Path) -> bool:
    """Return whether a path is a regular file; False for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder; False for names that no folder can have."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def resolve(path: Path) -> Path:
    """Return the absolute path behind all links.

    Raises:
        UserError: the links form a loop, or the name is too long.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{shorten(str(path))} cannot be read: {reason_of(error)}") from None


def open_file(path: Path) -> IO[bytes]:
    """Open a regular file for reading, without waiting for anything.

    Raises:
        UserError: it does not exist, is not a regular file, is not readable, or is a pointer of
            git-lfs.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise UserError(f"{shorten(str(path))} cannot be read: {reason_of(error)}") from None
    file = os.fdopen(descriptor, "rb") if _is_regular(descriptor) else None
    if file is None:
        kind = KINDS.get(stat.S_IFMT(os.fstat(descriptor).st_mode), "something else")
        os.close(descriptor)
        raise UserError(f"{path} is {kind}; expected a file")
    if file.peek(len(LFS_POINTER)).startswith(LFS_POINTER):
        file.close()
        raise UserError(
            f"{path} is a pointer of git-lfs, not the file itself; run git lfs pull in its folder"
        )
    return file


def _is_regular(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        UserError: as open_file, or it is not UTF-8.
    """
    with open_file(path) as file:
        content = file.read()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error.reason}") from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: as open_file, or it is not JSON.
    """
    with open_file(path) as file:
        content = file.read()
    try:
        return parse_json(content)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def parse_json(content: bytes) -> Any:
    """Parse JSON strictly: finite numbers only, no key twice, no nesting without end.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(
            content,
            parse_constant=_reject_constant,
            parse_float=_parse_finite,
            object_pairs_hook=_reject_duplicates,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _parse_finite(text: str) -> float:
    """Return the number; 1e999 would become Infinity, which is no JSON when it is written."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{shorten(text)} is beyond the range of numbers")
    return number


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {shorten(twice)!r} is not unique")
    return content


def reason_of(error: BaseException) -> str:
    """Return why a system call failed, without the path, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)


def one_line(error: BaseException) -> str:
    """Return the message of any exception in one line of bounded length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shorten(" ".join(lines) or type(error).__name__, 400)


def shorten(text: str, length: int = 200) -> str:
    """Return a text, cut in the middle if it is longer than `length`."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"
