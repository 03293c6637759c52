"""The two ways a run may end that are not a bug: the user can fix it, or a proof failed."""

import errno
import os
import shutil
from pathlib import Path

DISK_FULL_BYTES = 1 << 20  # bytes: a disk with fewer is full


class UserError(Exception):
    """Something the user can fix; one line that says what, where, and which values would work.

    The command exits with 2 and prints this line without a traceback.
    """


class VerificationError(Exception):
    """A written checkpoint failed verification, or a quality gate was missed; exit code 3."""


def disk_write_error(error: BaseException | None, folder: Path) -> str | None:
    """What is wrong with the disk of a folder, where that is the cause of an error, or None.

    torch's writers do not say it; that nothing is free does.
    """
    if folder.is_dir() and shutil.disk_usage(folder).free < DISK_FULL_BYTES:
        return os.strerror(errno.ENOSPC)
    while error is not None:
        for reason in map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EROFS)):
            if reason in str(error):
                return reason
        error = error.__cause__ or error.__context__
    return None
