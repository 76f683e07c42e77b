"""Files that change while they are read: the result would be a mixture of the old and the new."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from btx_merge.errors import Problem

Stamp = tuple[int, int]
"""Size, and time of the last change in nanoseconds. No inode: on some mounts it changes by itself."""
_CARD = "README.md"  # read once, for the card: a change of it mixes nothing


def stamp_of(file: Path) -> Stamp | None:
    """Return what tells whether a file is still the same; None where there is none."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def stamps_in(folder: Path) -> dict[Path, Stamp]:
    """Return the stamps of all files in a folder, not of those in its folders."""
    stamps = {}
    try:
        files = [file for file in folder.iterdir() if file.is_file()]
    except OSError:
        return {}
    for file in files:
        if (stamp := stamp_of(file)) is not None:
            stamps[file] = stamp
    return stamps


class ReadFiles:
    """The files that a result is made from, as they were before the first of them was opened."""

    def __init__(self, files: Iterable[tuple[str, Path]], before: Mapping[Path, Stamp]):
        """Take stamps of the files, or those that were taken before."""
        self._files = {file: source for source, file in files if file.name != _CARD}
        self._before = {file: before.get(file) or stamp_of(file) for file in self._files}

    @classmethod
    def of_folder(cls, source: str, before: Mapping[Path, Stamp]) -> ReadFiles:
        """Return all files of a model's folder, whose stamps are given; hidden ones are not read."""
        return cls([(source, file) for file in sorted(before) if not file.name.startswith(".")], before)

    def identity(self) -> list[list[object]]:
        """Return what an unfinished result depends on, in plain values: a copy of a file with its time is as good."""
        return sorted([source, file.name, *(self._before[file] or ())] for file, source in self._files.items())

    def changes(self) -> list[Problem]:
        """Return a problem for every file that is not what it was."""
        problems = []
        for file, source in self._files.items():
            if stamp_of(file) != self._before[file]:
                remedy = "Run the command again when nothing writes to it."
                problems.append(Problem(source, str(file), "changed while it was read", "", remedy))
        return problems
