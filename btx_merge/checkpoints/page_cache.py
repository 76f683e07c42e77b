"""Reading and writing of large files that leaves other programs' files in the system's page cache.

A file that was not cached before it was read is not left there: a merge reads its sources once. That also spares
the kernel the search for memory for pages that nobody needs again, which on many machines costs more than the
reading itself. A file that was cached stays.
"""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path

_PROBES = 16
"""Bytes of a file that are asked for. A file that was read as a whole is cached as a whole, so a few are enough."""


@functools.cache
def was_cached(file: Path) -> bool:
    """Return whether most of a file was in memory when first asked. True where nobody can tell."""
    if not hasattr(os, "RWF_NOWAIT") or not hasattr(os, "posix_fadvise"):
        return True
    step = max(1, file.stat().st_size // _PROBES)
    present = 0
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead because of the probes
        for place in range(_PROBES):
            with contextlib.suppress(BlockingIOError):  # it would have to be read from the disk
                present += bool(os.preadv(descriptor, [bytearray(1)], step * place + step // 2, os.RWF_NOWAIT))
    except OSError:  # a file system that cannot answer
        return True
    finally:
        os.close(descriptor)
    return present > _PROBES // 2


def forget_range(descriptor: int, start: int, nbytes: int) -> None:
    """Let the kernel drop a range of a file. What is not on the disk yet is not dropped, but begins to be written."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # only a hint: a file system that takes none is as good
            os.posix_fadvise(descriptor, start, nbytes, os.POSIX_FADV_DONTNEED)
