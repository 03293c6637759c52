"""The expected failures of a run: an error the user can fix, and a failed verification."""

import contextlib
import errno
import os
import shutil
import unicodedata
from pathlib import Path

CONTROL_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")  # line ends, NUL, bytes that are not UTF-8
DISK_FULL_BYTES = 1 << 20  # a disk with fewer free bytes counts as full


class _OneLineError(Exception):
    """An error whose message is one line, whatever names of tensors or images it quotes."""

    def __init__(self, message: str) -> None:
        super().__init__(escape_control_characters(message))


class UserError(_OneLineError):
    """An error the user can fix.

    The message is one line that says what is wrong, where, and which values are supported. The
    command prints it without a traceback and exits with code 2.
    """


class VerificationError(_OneLineError):
    """A written checkpoint failed verification, or a quality gate was missed; exit code 3."""


def has_control_characters(text: str) -> bool:
    """Return whether a text has characters that no path or name of a run may have.

    They would break lines of messages, logs and what shell scripts read.
    """
    return any(unicodedata.category(character) in CONTROL_CATEGORIES for character in text)


def escape_control_characters(text: str) -> str:
    """Return the text in one line that any terminal or file can hold."""
    if not has_control_characters(text):
        return text
    return "".join(
        repr(character)[1:-1] if has_control_characters(character) else character
        for character in text
    )


def disk_write_error(error: BaseException | None, folder: Path) -> str | None:
    """Return the disk error behind an exception, such as "No space left on device", or None.

    Some of torch's writers raise unrelated errors on a full disk, so free space is checked first.
    """
    with contextlib.suppress(OSError):  # the folder may be gone
        if shutil.disk_usage(folder).free < DISK_FULL_BYTES:
            return os.strerror(errno.ENOSPC)
    while error is not None:
        for reason in map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EROFS)):
            if reason in str(error):
                return reason
        error = error.__cause__ or error.__context__
    return None


def removed_path(error: BaseException | None, workdir: Path) -> Path | None:
    """Return the workdir, or what was in it, if an exception tells that somebody removed it."""
    if not workdir.is_dir():
        return workdir
    while error is not None:
        name = getattr(error, "filename", None) if isinstance(error, FileNotFoundError) else None
        if isinstance(name, str) and Path(name).absolute().is_relative_to(workdir.absolute()):
            return Path(name)
        error = error.__cause__ or error.__context__
    return None
