"""A folder for what is made apart from the result; what a killed run left of one goes at the next."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_PREFIX = "btx-scratch-"
_LOCK = "in-use.lock"


@contextmanager
def scratch_folder(parent: Path | None) -> Iterator[Path]:
    """Make an empty folder in `parent`, or where temporary files lie, and remove it in the end.

    While it is in use its lock is held, so that a later run knows the folders of runs that were killed. What cannot be
    removed is left to that run, too: the result is complete, and no error should say otherwise.
    """
    parent = parent or Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(parent)
    place = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent, ignore_cleanup_errors=True)
    with place as name, FileLock(Path(name) / _LOCK):
        folder = Path(name) / "files"
        folder.mkdir()
        yield folder


def move_in(files: Path, folder: Path) -> None:
    """Move files that were made apart into the folder of a result; its config last, without which it is no model yet.

    Raises:
        OSError: the disk refused.
    """
    for file in sorted(files.iterdir(), key=lambda file: file.name in ("config.json", "adapter_config.json")):
        place = folder / file.name
        if place.is_dir():  # of a run that was ended here
            shutil.rmtree(place)
        file.rename(place)


def _remove_leftovers(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        lock = folder / _LOCK
        if folder.is_symlink() or lock.is_symlink() or not lock.is_file():
            continue  # none of ours, or one that is being made
        try:
            with FileLock(lock, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except (Timeout, OSError):
            continue  # in use, or another user's
