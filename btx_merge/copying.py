"""A checkpoint whose tensors are ranges of another's files: copied as they are, streamed like a merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from btx_merge.combine import BLOCK_BYTES
from btx_merge.files import write_index
from btx_merge.layout import JOB_BYTES, Block, Extent, Job, Layout, lay_out, portions
from btx_merge.tensorfiles import StoredTensor
from btx_merge.writer import Progress, Staging, continuable, fingerprint


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


def copy_layout(tensors: Mapping[str, StoredTensor], shard_bytes: int) -> CopyLayout:
    """The given tensors, under the given names and in their order, in files of at most `shard_bytes`."""
    placed, shards = lay_out(((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()), shard_bytes)
    return CopyLayout(placed, shards, tensors)


def copied_rows(job: CopiedRows) -> Iterator[Block]:
    """A job's bytes, in blocks that fit a cache."""
    for start, stop in portions(job.start, job.stop, job.tensor.row_bytes, BLOCK_BYTES):
        yield 0, job.source.read_rows(start, stop)


def _fill(job: Job) -> Iterator[Block]:
    assert isinstance(job, CopiedRows)
    return copied_rows(job)


def write_copy(
    layout: CopyLayout,
    output: Path,
    write_files: Callable[[Path], None],
    *,
    overwrite: bool,
    workers: int | None,
    progress: Progress | None,
    on_note: Callable[[str], None] | None,
) -> int:
    """Writes the weights, has `write_files` add the rest (config.json last), and gives the folder its name.

    What was interrupted is continued by the same call.

    Returns:
        Bytes of an earlier, interrupted run that were kept.

    Raises:
        InputError: no room, or something that may not be replaced has come into the output's place.
        MergeError: the disk refused; `MergeInterrupted` for Ctrl-C.
    """
    with continuable(output), Staging(output, layout, _fill, _fingerprint(layout)) as staging:
        staging.write(workers, progress, on_note)
        write_index(layout, staging.folder)
        write_files(staging.folder)
        staging.finish(overwrite)
    return staging.kept_bytes


def _fingerprint(layout: CopyLayout) -> str:
    """Says whether an unfinished copy is of these tensors of these files."""
    files = sorted({(str(tensor.file), tensor.file) for tensor in layout.sources.values()})
    tensors = [[name, tensor.file.name, tensor.places] for name, tensor in layout.sources.items()]
    return fingerprint(layout, files, tensors)
