"""A checkpoint whose tensors are ranges of another's files: copied as they are, streamed as a merge is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from btx_merge.checkpoints.layout import (
    BLOCK_BYTES,
    JOB_BYTES,
    Block,
    Extent,
    Job,
    Layout,
    OutputTensor,
    Shard,
    lay_out,
    portions,
)
from btx_merge.checkpoints.staging import Staging
from btx_merge.checkpoints.stored import StoredTensor
from btx_merge.checkpoints.tensor_files import read_tensor_file
from btx_merge.files.changes import ReadFiles, Stamp
from btx_merge.reporting import Reporter


@dataclass(frozen=True, slots=True)
class CopiedRows(Job):
    """Rows of a stored tensor as they are."""

    source: StoredTensor


@dataclass(frozen=True)
class CopyLayout(Layout):
    """A checkpoint of copied tensors."""

    sources: Mapping[str, StoredTensor]
    """By the copy's names."""

    @cached_property
    def jobs(self) -> tuple[Job, ...]:
        jobs: list[Job] = []
        for tensor in self.tensors:
            for start, stop in portions(0, tensor.shape[0], tensor.row_bytes, JOB_BYTES):
                extent = Extent(tensor.start + start * tensor.row_bytes, (stop - start) * tensor.row_bytes)
                jobs.append(CopiedRows(tensor, (extent,), start, stop, self.sources[tensor.name]))
        return tuple(jobs)


NO_TENSORS = CopyLayout((), (), {})
"""The layout of a folder without weights of ours, such as a report's or an adapter's."""


def copy_layout(tensors: Mapping[str, StoredTensor], shard_bytes: int) -> CopyLayout:
    """Lay out the given tensors, by their new names and in their order, in files of at most `shard_bytes`."""
    placed, shards = lay_out(((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()), shard_bytes)
    return CopyLayout(placed, shards, tensors)


def same_layout(folder: Path) -> CopyLayout:
    """Return the tensors of a checkpoint in the files and the places where they are.

    Raises:
        InputError: a file that cannot be read.
    """
    shards: list[Shard] = []
    placed: list[OutputTensor] = []
    sources: dict[str, StoredTensor] = {}
    for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
        stored = read_tensor_file(file)
        data_starts = min((tensor.start for tensor in stored.values()), default=file.stat().st_size)
        with file.open("rb") as handle:  # the header as it is, whatever it says beside the tensors
            shards.append(Shard(file.name, handle.read(data_starts), file.stat().st_size))
        for name, tensor in stored.items():
            placed.append(OutputTensor(name, tensor.dtype, tensor.shape, number, tensor.start))
        sources |= stored
    return CopyLayout(tuple(placed), tuple(shards), sources)


def fill_copy(job: Job) -> Iterator[Block]:
    """Return the bytes of a job of a `CopyLayout`, in blocks that fit a cache."""
    if not isinstance(job, CopiedRows):
        raise TypeError(f"{job.key} copies nothing")
    for start, stop in portions(job.start, job.stop, job.tensor.row_bytes, BLOCK_BYTES):
        yield 0, job.source.read_rows(start, stop)


def copy_staging(
    layout: CopyLayout,
    folder: Path,
    stamps: Mapping[Path, Stamp],
    output: Path,
    reporter: Reporter,
) -> Staging:
    """Return the folder in which a copy of a model's tensors is written.

    Args:
        folder: where the copied tensors lie.
        stamps: of its files, before any of them was read.
    """
    tensors = [[name, tensor.file.name, tensor.places] for name, tensor in layout.sources.items()]
    read = ReadFiles.of_folder("model", stamps)
    return Staging(output, layout, fill_copy, read, str(folder), tensors, reporter=reporter)
