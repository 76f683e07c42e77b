"""The layout of a checkpoint that is to be written: where every tensor lies, and the jobs that fill it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btx_merge.checkpoints.dtypes import STORED, Raw
from btx_merge.files.folder import write_json

BLOCK_BYTES = 1 << 18
"""256 KB: a block stays in a core's second-level cache between being read, checked and written."""

_PAGE = 4096
"""Data begins at a multiple of it, so that reading, writing and mapping the file go by whole pages."""
JOB_BYTES = 64_000_000
"""Of output: the unit of parallel work and of resuming. A crash costs a fraction of a second of work a worker, and the
journal, of a hundred bytes a job, stays small."""

INDEX_FILE = "model.safetensors.index.json"

Block = tuple[int, Raw]
"""Bytes for one of a job's extents (by its number), behind those that it got before."""
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the result and its place."""

    name: str
    """As the checkpoint has it."""
    dtype: str
    """safetensors' name, one of `dtypes.STORED`."""
    shape: tuple[int, ...]
    """Its dimensions; the first counts its rows."""
    shard: int
    """The number of its file, from 0."""
    start: int
    """Byte in the shard's file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * STORED[self.dtype].itemsize

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.shape[0]


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes in a shard's file."""

    start: int
    """The first byte, from the beginning of the file."""
    nbytes: int
    """How many."""


@dataclass(frozen=True, slots=True)
class Job:
    """A part of one output tensor. Its kind says what fills it; its extents, where that goes."""

    tensor: OutputTensor
    """The tensor that it fills in part."""
    extents: tuple[Extent, ...]
    """Where its bytes go: one run, or one for each expert that gets a part of every row."""
    start: int
    """First row: of the source's tensor in the jobs for experts, of the output in the others."""
    stop: int
    """The row behind its last."""

    @property
    def key(self) -> str:
        """Names the job in the journal, the same in every run of one plan."""
        return f"{self.tensor.name}@{self.extents[0].start}"

    @property
    def nbytes(self) -> int:
        return sum(extent.nbytes for extent in self.extents)


@dataclass(frozen=True)
class Shard:
    """A file of the result."""

    name: str
    """Without a folder."""
    header: bytes
    """What the file begins with: the header's length and the header."""
    nbytes: int
    """The file's whole size."""


@dataclass(frozen=True)
class Layout:
    """The files of a checkpoint. Its kinds say what the jobs are."""

    tensors: tuple[OutputTensor, ...]
    """All tensors, file by file."""
    shards: tuple[Shard, ...]
    """The files."""

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Everything that fills the tensors; together they write every byte of them once."""
        raise NotImplementedError

    @property
    def parameters(self) -> int:
        """All weights."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def bytes_to_write(self) -> int:
        """The size of all files, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    def index(self) -> dict[str, Any]:
        """Return the content of model.safetensors.index.json, which several files need."""
        total = sum(tensor.nbytes for tensor in self.tensors)
        weight_map = {tensor.name: self.shards[tensor.shard].name for tensor in self.tensors}
        return {"metadata": {"total_parameters": self.parameters, "total_size": total}, "weight_map": weight_map}


def lay_out(
    tensors: Iterable[tuple[str, str, Shape]], shard_bytes: int
) -> tuple[tuple[OutputTensor, ...], tuple[Shard, ...]]:
    """Place tensors, given by name, dtype and shape, in files of at most `shard_bytes` (or of one larger tensor).

    >>> tensors, shards = lay_out([("a", "F32", (2, 3)), ("b", "BF16", (4,))], shard_bytes=24)
    >>> [(tensor.name, tensor.shard, tensor.nbytes) for tensor in tensors]
    [('a', 0, 24), ('b', 1, 8)]
    >>> [shard.name for shard in shards]
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    groups: list[list[tuple[str, str, Shape]]] = [[]]
    filled = 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * STORED[dtype].itemsize
        if groups[-1] and filled + nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((name, dtype, shape))
        filled += nbytes
    # A header's size depends on all tensors of its file, so places are known only once the files are.
    placed: list[OutputTensor] = []
    shards = []
    for number, group in enumerate(groups):
        name = f"model-{number + 1:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else "model.safetensors"
        header, starts, nbytes = _header(group)
        shards.append(Shard(name, header, nbytes))
        for tensor, dtype, shape in group:
            placed.append(OutputTensor(tensor, dtype, shape, number, starts[tensor]))
    return tuple(placed), tuple(shards)


def _header(group: Sequence[tuple[str, str, Shape]]) -> tuple[bytes, dict[str, int], int]:
    """Return a safetensors header as bytes, where each tensor starts in the file, and the file's size."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, offset = {}, 0
    for name, dtype, shape in group:
        end = offset + math.prod(shape) * STORED[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offsets[name], offset = offset, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)  # the format allows spaces behind the JSON
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in offsets.items()}, len(header) + offset


def portions(start: int, stop: int, row_bytes: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Cut rows [start, stop) into pieces of at most `nbytes`, but never less than one row.

    >>> list(portions(2, 9, row_bytes=10, nbytes=30))
    [(2, 5), (5, 8), (8, 9)]
    """
    size = max(1, nbytes // row_bytes)
    return ((first, min(first + size, stop)) for first in range(start, stop, size))


def write_index(layout: Layout, folder: Path) -> None:
    """Write the index, which says which tensor lies in which file; a single file needs none."""
    if len(layout.shards) > 1:
        write_json(folder / INDEX_FILE, layout.index())
