"""A tensor as it lies in a file, or in parts of several: rows are read, never the whole.

Every format ends up as `StoredTensor`: a range of bytes in a file. The rest of the package knows no formats.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

import numpy as np

from btx_merge.checkpoints.dtypes import STORED, Raw
from btx_merge.checkpoints.layout import BLOCK_BYTES, portions
from btx_merge.checkpoints.page_cache import forget_range, was_cached
from btx_merge.errors import InputError, Problem
from btx_merge.files.disk_errors import naming
from btx_merge.files.folder import checked

MAX_HEADER = 25_000_000
"""Bytes of a header, or of the pickle that is one in torch's format. A hundred thousand tensors need 15 MB."""
FETCH_AGAIN = "Download or copy the file again."

Lent = Raw
"""Bytes in a buffer of this thread that its next read overwrites: whatever must stay longer is copied."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as it lies in a file: row-major, `nbytes` bytes from `start`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is of one index of the first dimension."""
        return self.nbytes // max(1, self.shape[0]) if self.shape else self.nbytes

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Where its bytes lie in the file: first byte and number of each run."""
        return ((self.start, self.nbytes),)

    def read_rows(self, start: int, stop: int) -> Lent:
        """Read rows [start, stop) as flat bytes that are only lent: this thread's next read overwrites them.

        Fresh memory for every block would cost more than reading it.

        Raises:
            InputError: the file ends before the tensor does.
            OSError: the disk refused.
        """
        first, nbytes = self.start + start * self.row_bytes, (stop - start) * self.row_bytes
        if nbytes > getattr(_buffers, "raw", _NOTHING).size:
            _buffers.raw = np.empty(nbytes, np.uint8)
        out: Raw = _buffers.raw[:nbytes]
        with naming(self.file), self.file.open("rb", buffering=0) as file:
            self._fill(out, file, first)
            if not was_cached(self.file):
                forget_range(file.fileno(), first, nbytes)
        return out

    def gather_rows(self, rows: Sequence[int]) -> Raw:
        """Read single rows, in this order, as flat bytes in memory of their own.

        The file is opened once for all, since that takes longer than to read a row. What is read stays in the page
        cache: the rows between these are most often gathered next.

        Raises:
            InputError: the file ends before the tensor does.
            OSError: the disk refused.
        """
        out = np.empty((len(rows), self.row_bytes), np.uint8)
        with naming(self.file), self.file.open("rb", buffering=0) as file:
            for row, place in zip(rows, out, strict=True):
                self._fill(place, file, self.start + row * self.row_bytes)
        return out.reshape(-1)

    def _fill(self, out: Raw, file: FileIO, first: int) -> None:
        """Read bytes of the file from `first` on until `out` is full."""
        file.seek(first)
        filled = 0
        while filled < len(out):  # Linux gives at most 2 GiB for one call
            got = file.readinto(out.data[filled:])
            if not got:
                raise InputError([file_problem(self.file, f"ends inside tensor {self.name}", "", FETCH_AGAIN)])
            filled += got


_buffers = threading.local()  # workers read at the same time, so each has a buffer of its own
_NOTHING = np.empty(0, np.uint8)  # what a tensor without values holds


def file_problem(file: Path, found: str, expected: str = "", remedy: str = "") -> Problem:
    return Problem(file.parent.name, file.name, found, expected, remedy)


def checked_file(file: Path) -> Path:
    try:
        return checked(file)
    except InputError as error:
        raise InputError(replace(problem, where=file.name) for problem in error.problems) from error


@dataclass(frozen=True, slots=True)
class JoinedTensor(StoredTensor):
    """Parts of one shape beside each other: rows below rows, or columns behind columns."""

    parts: tuple[StoredTensor, ...] = ()
    by_columns: bool = False

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        return tuple(place for part in self.parts for place in part.places)

    def read_rows(self, start: int, stop: int) -> Raw:
        """Read rows [start, stop) as flat bytes, in memory of their own."""
        if self.by_columns:  # each part is copied: the next one is read into the same buffer
            rows = [part.read_rows(start, stop).reshape(stop - start, -1).copy() for part in self.parts]
            return np.concatenate(rows, axis=1).reshape(-1)
        height = self.parts[0].shape[0]
        pieces = []
        for number, part in enumerate(self.parts):  # part `number` holds rows [number * height, (number + 1) * height)
            first, last = max(start, number * height), min(stop, (number + 1) * height)
            if first < last:
                pieces.append(part.read_rows(first - number * height, last - number * height).copy())
        return np.concatenate(pieces)

    def gather_rows(self, rows: Sequence[int]) -> Raw:
        """Read single rows, in this order, as flat bytes in memory of their own."""
        return np.concatenate([self.read_rows(row, row + 1) for row in rows])


def join(parts: Sequence[StoredTensor], by_columns: bool = False) -> StoredTensor:
    """Join tensors of one shape and dtype into one; a single one stays as it is."""
    first = parts[0]
    if len(parts) == 1:
        return first
    rows, columns = first.shape
    # The whole has no place of its own in a file: -1 for its start, and `places` asks the parts.
    shape = (rows, columns * len(parts)) if by_columns else (rows * len(parts), columns)
    nbytes = first.nbytes * len(parts)
    return JoinedTensor(first.name, first.file, first.dtype, shape, -1, nbytes, tuple(parts), by_columns)


def part_of(tensor: StoredTensor, index: int, start: int = 0, stop: int | None = None) -> StoredTensor:
    """Return rows [start, stop) of `tensor[index]`, for a tensor [E, rows, columns], without reading them."""
    _, rows, columns = tensor.shape
    stop = rows if stop is None else stop
    row_bytes = columns * STORED[tensor.dtype].itemsize
    first = tensor.start + (index * rows + start) * row_bytes
    return StoredTensor(
        tensor.name, tensor.file, tensor.dtype, (stop - start, columns), first, (stop - start) * row_bytes
    )


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two tensors hold the same numbers in the same dtype. Reads both."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    rows = one.shape[0] if one.shape else 1
    for start, stop in portions(0, rows, max(1, one.row_bytes), BLOCK_BYTES):
        ours = one.read_rows(start, stop).copy()  # the next read uses the same buffer
        if not np.array_equal(ours, other.read_rows(start, stop)):
            return False
    return True


def flat_bytes(tensor: StoredTensor) -> StoredTensor:
    """Return a tensor in one piece as rows of one byte, without reading them."""
    return replace(tensor, shape=(tensor.nbytes,))
