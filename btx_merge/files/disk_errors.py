"""What a disk's refusal means for the user: which file it was, and what helps."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from btx_merge.errors import MergeError, MergeInterrupted

CONTINUES = "What is finished is kept: the same command continues."
_ANOTHER_PLACE = "Write to a local disk, and copy the result from there."
# Refusals that room, time or another setting of the machine cures, so that the same command may succeed.
_CURABLE = {
    errno.ENOSPC: "Make room.",
    errno.EDQUOT: "Make room in your quota, or ask for a larger one.",
    errno.EIO: "Check the disk.",
    errno.EINTR: "",
    errno.EAGAIN: "",
    errno.ETIMEDOUT: "",
    errno.ESTALE: "",
    errno.ENOMEM: "Free some memory.",
    errno.EMFILE: "Allow more open files (ulimit -n).",
    errno.ENFILE: "Allow more open files.",
}
_LASTING = {
    errno.EACCES: "Get the permission, or choose another folder.",
    errno.EPERM: "Get the permission, or choose another folder.",
    errno.EROFS: "It can only be read: choose an --output on another disk.",
    errno.ENOENT: "Nothing is there, and nothing can be made there: choose another folder.",
    errno.ENOTDIR: "Choose a folder.",
    errno.EISDIR: "A folder has the name of a file: move it away.",
    errno.EEXIST: "Move it away.",
    errno.ENOTEMPTY: "Move it away.",
    errno.ELOOP: "Its links lead in a circle: choose another folder.",
    errno.ENAMETOOLONG: "Choose a shorter name for --output.",
    errno.EFBIG: "Raise the limit (ulimit -f), write elsewhere, or merge with a smaller --max-shard-size.",
    errno.EBUSY: "Something uses it, as a mount does: choose another --output.",
    errno.ENOSYS: f"Its file system cannot do this. {_ANOTHER_PLACE}",
    errno.ENOTSUP: f"Its file system cannot do this. {_ANOTHER_PLACE}",
    errno.EOPNOTSUPP: f"Its file system cannot do this. {_ANOTHER_PLACE}",
    errno.EINVAL: f"Its file system cannot do this. {_ANOTHER_PLACE}",
    errno.EXDEV: f"Its file system cannot do this. {_ANOTHER_PLACE}",
    errno.ENOLCK: f"Its file system has no locks. {_ANOTHER_PLACE}",
}

_UNSYNCED = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
"""Refusals to sync that mean lost bytes. Any other means that the file system cannot sync at all."""


def is_curable(error: OSError) -> bool:
    """Return whether the same command may succeed later."""
    return error.errno in _CURABLE


def remedy_of(error: OSError, continues: str = CONTINUES) -> str:
    """Return what helps against a refusal, in one line.

    Args:
        continues: how the work goes on once the cause is gone; said only where it can go.
    """
    if error.errno in _CURABLE:
        return f"{_CURABLE[error.errno]} {continues}".strip()
    return _LASTING.get(error.errno or 0, "")


def file_of(error: OSError, otherwise: Path) -> str:
    """Return the file that an error is about: of two, the one that was written."""
    return os.fsdecode(error.filename2 or error.filename or otherwise)


def disk_error(error: OSError, otherwise: Path, continues: str = CONTINUES) -> MergeError:
    """Return a disk's refusal as one line for the user.

    Args:
        otherwise: what to name where the system does not say which file it was.
        continues: see `remedy_of`.
    """
    line = f"{file_of(error, otherwise)}: {error.strerror or error}. {remedy_of(error, continues)}"
    return MergeError(line.strip())


@contextlib.contextmanager
def continuable(
    output: Path, continues: str = CONTINUES, interrupted: MergeInterrupted | None = None
) -> Iterator[None]:
    """Turn a disk's refusal and Ctrl-C into errors that say whether the same command continues.

    Args:
        continues: see `remedy_of`.
        interrupted: the error for Ctrl-C where the same command does not continue.

    Raises:
        MergeError: the disk refused; `MergeInterrupted` for Ctrl-C.
    """
    try:
        yield
    except OSError as error:
        raise disk_error(error, output, continues) from error
    except KeyboardInterrupt:
        raise interrupted or MergeInterrupted() from None


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Add the name of `file` to an error of the system that names none, as those of reading and writing do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise


def sync(path: Path) -> None:
    """Have a file or a folder stored, so that a power cut does not undo it.

    A file system that cannot do this for a folder, or at all, is passed over.

    Raises:
        OSError: the disk is full or broken.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # a parent that may be written but not read
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in _UNSYNCED:
            error.filename = str(path)
            raise
    finally:
        os.close(descriptor)
