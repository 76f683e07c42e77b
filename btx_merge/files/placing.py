"""The place of an output: whether a result can go there, and the one step in which it does.

Beside the output OUT there are, while a command works, two folders of fixed names:

    OUT.btx-partial   what is written; it becomes OUT when it is complete
    OUT.btx-old       what OUT was before, on its way out

Where the system can exchange two folders in one step, OUT is never absent. Elsewhere, a run that is killed between
the two renames leaves it absent, and the next one puts it back (`repair`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from btx_merge.errors import InputError, MergeError, Problem
from btx_merge.files.disk_errors import is_curable, remedy_of, sync
from btx_merge.files.precious import foreign_problem, precious_problem

JOURNAL, LOCK = "btx_journal.jsonl", "btx_lock"
MARKS = frozenset((JOURNAL, LOCK))
"""Files that make a folder known as ours. They leave it right after it got its name, and are no part of a model."""
_PARTIAL, _OLD = ".btx-partial", ".btx-old"
_PROBES = ("btx_probe", "btx_probe_renamed")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and fs.h

Note = Callable[[str], None]
"""Called with a line about what an earlier run left, or about what could not be cleared."""


def place_of(output: str | Path) -> Path:
    """Return where an output is to lie, as an absolute path without links.

    Raises:
        InputError: the path names no place.
    """
    try:
        return Path(output).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # `~` of nobody, links in a circle, a NUL
        raise InputError([Problem("output", str(output), f"no path ({error})", "", "Give another one.")]) from error


def partial_of(target: Path) -> Path:
    """Return the folder in which an output is written."""
    return target.with_name(target.name + _PARTIAL)


def old_of(target: Path) -> Path:
    """Return the folder for what an output replaces."""
    return target.with_name(target.name + _OLD)


def has_marks(folder: Path) -> bool:
    """Return whether a run wrote this folder and did not come to its very end."""
    return any((folder / name).exists() for name in MARKS)


def lock(folder: Path) -> int:
    """Lock a folder until the descriptor that is returned is closed, if only by the end of the process.

    Raises:
        InputError: another process holds the lock, the file system has none, or the lock's file is a link.
    """
    file = folder / LOCK
    if file.is_symlink():
        raise InputError([Problem("output", str(file), "a link", "a plain file", "Remove it.")])
    is_new = not file.exists()
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            found, remedy = "another merge is writing it now", "Wait for it or stop it."
        else:
            found, remedy = f"cannot be locked: {error.strerror}", remedy_of(error)
            if is_new:
                file.unlink()
        raise InputError([Problem("output", str(folder), found, "", remedy)]) from error
    return descriptor


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse an output that cannot become a folder of ours. Nothing is written.

    Raises:
        InputError: it is a file, a mount point, or a name that is too long; or it holds something that may not be
            replaced; or unfinished work beside it holds links.
    """
    if problem := precious_problem(target):
        raise InputError([problem])
    file = next((path for path in (target, *target.parents) if os.path.isfile(path)), None)
    if file is not None:
        raise InputError([Problem("output", str(file), "a file", "a folder that is empty or not there yet")])
    try:
        os.lstat(partial_of(target))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        found = error.strerror or str(error)
        raise InputError([Problem("output", str(target), found, "", remedy_of(error))]) from error
    if problem := _link_beside(target):
        raise InputError([problem])
    if (mount := _mount_in(target)) is not None:
        found = "a mount point" if mount == target else f"holds a mount point, {mount}"
        remedy = f"Give a folder in it, such as --output {mount / 'merged'}."
        raise InputError([Problem("output", str(target), found, "a folder that can be renamed", remedy)])
    if problem := foreign_problem(target):
        raise InputError([problem])
    if overwrite:
        return
    if target.is_dir() and any(target.iterdir()):
        remedy = "Give another --output, or --overwrite to replace it when the new model is complete."
        raise InputError([Problem("output", str(target), "not empty", "an empty or a new folder", remedy)])
    if old_of(target).is_dir():
        found = f"was there until a run was ended while it replaced it; it is {old_of(target)} now"
        remedy = "Rename that folder, or give --overwrite to replace it when the new model is complete."
        raise InputError([Problem("output", str(target), found, "", remedy)])


def _link_beside(target: Path) -> Problem | None:
    """Return the first link in what an earlier run left beside an output."""
    partial, old = partial_of(target), old_of(target)
    if partial.is_symlink() or has_marks(partial):  # otherwise it is not written: refused, or cleared by `repair`
        problem = leads_elsewhere(partial)
        if problem:
            return problem
    return leads_elsewhere(old) if old.is_symlink() else None


def leads_elsewhere(folder: Path) -> Problem | None:
    """Return what in a folder of unfinished work is no plain file of one name and no folder, if anything.

    To write there would be to write elsewhere, and the folder of an unpacked archive may hold anything.
    """
    if folder.is_symlink():
        found, remedy = f"a link to {os.readlink(folder)}", "Remove the link."
        return Problem("output", str(folder), found, "a folder", remedy)
    for path in sorted(folder.rglob("*")):  # links are not followed
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            found = f"a link to {os.readlink(path)}"
        elif stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
            found = "a hard link: the file has another name elsewhere"
        elif not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            found = "neither a file nor a folder"
        else:
            continue
        remedy = f"Remove {folder}; then the same command begins anew."
        return Problem("output", str(path), found, "a plain file, as all unfinished work is", remedy)
    return None


def _mount_in(target: Path) -> Path | None:
    """Return the mount point that a folder is or holds; a folder that is one cannot be renamed."""
    if os.path.ismount(target):
        return target
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None  # no Linux: there, mounts of a folder of the same file system are not seen
    for line in lines:
        escaped = line.split(" ")[4]
        mount = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), escaped))
        if mount == target or target in mount.parents:
            return mount
    return None


def repair(target: Path, note: Note) -> None:
    """Clear what a run left that was ended while it put its result in place; bring back what it was replacing.

    The caller holds the lock of the output, or knows otherwise that nothing else writes it.

    Raises:
        OSError: the disk refused.
    """
    partial, old = partial_of(target), old_of(target)
    if has_marks(target):  # it got its name, and then the run was ended
        if partial.is_dir() and not has_marks(partial):  # the two were exchanged: this is what was replaced
            remove(old, note)
            partial.rename(old)
        _remove_marks(target, note)
    if not old.is_dir():
        return
    if target.exists():
        remove(old, note)
        note(f"Removed {old}, which an earlier run replaced before it was ended.")
    else:
        old.rename(target)
        note(f"{target} is back: an earlier run was ended while it replaced it.")


def try_rename(folder: Path) -> None:
    """Refuse a place where folders cannot be renamed, as on some mounts of object stores.

    Raises:
        InputError: they cannot.
    """
    probe, renamed = (folder / name for name in _PROBES)
    try:
        for left in (probe, renamed):
            shutil.rmtree(left, ignore_errors=True)
        probe.mkdir()
        (probe / "file").touch()
        probe.rename(renamed)
    except OSError as error:
        if is_curable(error):
            raise
        found = f"a folder cannot be renamed there: {error.strerror}"
        expected = "a file system that can, for a result gets its name when it is complete"
        raise InputError([Problem("output", str(folder.parent), found, expected, remedy_of(error))]) from error
    finally:
        for left in (probe, renamed):
            shutil.rmtree(left, ignore_errors=True)


def put_in_place(folder: Path, target: Path, overwrite: bool, note: Note, again: str) -> None:
    """Give a complete folder the target's name, and remove what had it before.

    All is on the disk before the result has its name, and the name before anything is removed. What cannot be
    removed afterwards is said in a note.

    Args:
        again: which command finishes what could not be put in place.

    Raises:
        InputError: something that may not be replaced has come into the target's place meanwhile.
        MergeError: the folder cannot get the name; it stays where it is, complete. Or it has the name, which the disk
            has not stored for good.
        OSError: the disk refused to store what was written.
    """
    check_target(target, overwrite)
    for path in (*folder.rglob("*"), folder):
        sync(path)
    replaced = None
    try:
        if target.exists() and any(target.iterdir()):
            replaced = _replace(folder, target, note)
        else:
            os.replace(folder, target)  # an empty folder makes way
    except OSError as error:
        text = f"{target}: {error.strerror}. The result is complete, in {folder}, but cannot get its name. "
        text += f"Move away what is at {target}, then {again} finishes; or copy the result by `cp -r`."
        raise MergeError(text) from error
    unstored = None
    try:
        sync(target.parent)
    except OSError as error:
        unstored = error
    if replaced is not None and replaced != old_of(target):
        try:
            replaced.rename(old_of(target))
            replaced = old_of(target)
        except OSError:
            pass  # it is removed under the name that it has
    _remove_marks(target, note)
    if unstored is not None:  # there is nothing to repeat, and what was replaced may be needed
        text = f"{target}: the result is complete and in its place, but the disk has not stored its name for good "
        text += f"({unstored.strerror}). Check the disk, and copy the result to another one."
        raise MergeError(text + (f" What it replaced is {replaced}." if replaced else "")) from unstored
    if replaced is not None:
        remove(replaced, note)


def _replace(folder: Path, target: Path, note: Note) -> Path:
    """Give a folder the name of another. Return where that one is then."""
    if _exchange(folder, target):
        return folder
    old = old_of(target)
    remove(old, note)
    target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        old.rename(target)  # the target is there again, as it was
        raise
    return old


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step. Return False where the system cannot; then nothing has happened."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Python has no call for it
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def remove(folder: Path, note: Note) -> None:
    """Remove a folder that nobody needs any more; what cannot be removed is said, and no failure."""
    if not folder.is_dir():
        return
    try:
        shutil.rmtree(folder)
    except OSError as error:
        note(f"{folder} could not be removed ({error.strerror}): it is not needed any more, remove it by hand.")


def _remove_marks(folder: Path, note: Note) -> None:
    """Take the journal and the lock out of a result; what cannot be removed is said, and no failure."""
    for name in (JOURNAL, LOCK):
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            note(f"{folder / name} could not be removed ({error.strerror}): it is no part of the model.")
