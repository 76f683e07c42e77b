"""The staged writing of a plan: stream the bytes, continue after an interruption, finish in one step.

All is written into `OUTPUT.btx-partial` beside the target. A journal there names every finished job with the
checksums of its bytes; a later run of the same plan verifies and keeps those. When nothing is missing the folder
takes the target's name. So whatever has the target's name is complete.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import Any

from btx_merge.checkpoints.layout import Block, Job, Layout
from btx_merge.checkpoints.page_cache import forget_range
from btx_merge.errors import InputError, MergeError, Problem
from btx_merge.files.bounded_json import parse_json
from btx_merge.files.changes import ReadFiles
from btx_merge.files.disk_errors import is_curable, naming, remedy_of
from btx_merge.files.placing import JOURNAL, LOCK, has_marks, lock, partial_of, put_in_place, repair, try_rename
from btx_merge.reporting import Reporter, readable

_SCRATCH = "btx_files"
_READ_BYTES = 1 << 20  # 1 MB: a block of a file whose checksum is verified
_JOURNAL_LIMIT = 100_000_000  # bytes; a job takes a hundred and writes up to 64 MB, so this is for 64 TB
_LAG = 8
"""Jobs that the disk gets time for before their bytes leave the cache, since bytes that are not on the disk yet cannot
leave it. At 64 MB a job that is half a gigabyte, or half a second of a fast disk."""

Fill = Callable[[Job], Iterator[Block]]
"""The bytes of a job in order, each for one of its extents."""


class Staging:
    """The folder beside the target in which a result is written. Use as a context: it is locked meanwhile.

    Whatever ends the context early is held against the sources: where one of them has changed, that is the error.
    """

    def __init__(
        self,
        output: Path,
        layout: Layout,
        fill: Fill,
        read: ReadFiles,
        *what: Any,
        reporter: Reporter,
    ):
        """Prepare to write `layout` into a folder beside `output`.

        Args:
            read: the files that the result is made from.
            what: else the bytes depend on; plain values. What was left unfinished of other files, values or layout,
                or of another version, is thrown away.
            reporter: is told what an earlier run left, and the bytes that are written.
        """
        self.output, self.folder = output, partial_of(output)
        self.layout, self.fill, self.read = layout, fill, read
        self.reporter = reporter
        values = [version("btx-merge"), what, read.identity(), [shard.nbytes for shard in layout.shards]]
        self.fingerprint = hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()
        self.kept_bytes = 0
        """Bytes of an earlier run that were verified and kept."""
        self._finished: set[str] = set()  # keys of jobs, of this run and of an earlier one
        self._began = False
        self._journal_lock = threading.Lock()
        self._stop = threading.Event()
        self._behind: collections.deque[Job] = collections.deque()

    def __enter__(self) -> Staging:
        """Lock and open the folder, and find out what an earlier run finished."""
        for folder in (self.output, self.folder):
            if has_marks(folder):
                os.close(lock(folder))  # raises if another process is at work there
        try:
            repair(self.output, self.reporter.note)
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if is_curable(error):
                raise
            where, found = str(error.filename or self.folder), error.strerror or str(error)
            raise InputError([Problem("output", where, found, "", remedy_of(error))]) from error
        if any(self.folder.iterdir()) and not has_marks(self.folder):
            found, remedy = "holds files, but no unfinished merge", "Move it away."
            raise InputError([Problem("output", str(self.folder), found, "", remedy)])
        try:
            self._lock = lock(self.folder)
        except InputError:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # where it is new
            raise
        try:
            try_rename(self.folder)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Unlock the folder, and remove it if nothing in it is worth keeping."""
        changes = self.read.changes() if isinstance(error, Exception) else []
        if changes:
            self._finished.clear()  # whatever was written may be of both
        self._leave()
        if changes:
            raise InputError(changes) from error

    def _leave(self) -> None:
        """Remove the folder where it holds nothing that the next run could keep; unlock it."""
        may_be_kept = self._finished or (not self._began and (self.folder / JOURNAL).exists())
        if not may_be_kept and (self.folder / LOCK).exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def discard(self) -> None:
        """Keep nothing of what was written once the context ends."""
        self._finished.clear()

    def scratch(self) -> Path:
        """Return a new, empty folder for files on their way to the result. It goes before the result gets its name."""
        folder = self.folder / _SCRATCH
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def path(self, job: Job) -> Path:
        """Return the file that a job writes to."""
        return self.folder / self.layout.shards[job.tensor.shard].name

    def write(self, workers: int | None = None, again: str = "") -> None:
        """Fill all files of weights, but for what an earlier run finished.

        Args:
            workers: threads; by default one per core, at most 4.
            again: how the work goes on once there is room for it, where all but the writing is done.

        Raises:
            InputError: the disk has too little room, or the folder holds something else.
            NonFiniteError: a NaN or an Inf was met, and the recipe does not allow it.
            OSError: the disk refused.
        """
        self._prepare(again)
        if self.kept_bytes:
            self.reporter.note(f"Continuing: {readable(self.kept_bytes)} were written before and are verified.")
        self.reporter.started(sum(job.nbytes for job in self.layout.jobs))
        self.reporter.bytes_done(self.kept_bytes)
        self._run(workers or min(4, os.cpu_count() or 1))

    def _prepare(self, again: str) -> None:
        """Find out what an earlier run finished, and make room for the rest."""
        recorded = self._read_journal()
        if recorded is None:
            self._start_over()
        self._began = True
        jobs = {job.key: job for job in self.layout.jobs}
        for key, checksums in (recorded or {}).items():  # the journal may tell of bytes that a power cut has undone
            if key in jobs and self._checksums(jobs[key]) == checksums:
                self._finished.add(key)
                self.kept_bytes += jobs[key].nbytes
        self._check_room(again)
        for shard in self.layout.shards:
            path = self.folder / shard.name
            with naming(path):
                with path.open("ab") as file:
                    file.truncate(shard.nbytes)  # to its whole size, so that workers can write anywhere in it
                    if hasattr(os, "posix_fallocate"):
                        with contextlib.suppress(OSError):  # a file system that cannot reserve still can write
                            os.posix_fallocate(file.fileno(), 0, shard.nbytes)
                with path.open("r+b") as file:
                    file.write(shard.header)

    def _run(self, workers: int) -> None:
        """Write everything that is not finished yet."""
        with ThreadPoolExecutor(workers, "btx-writer") as pool:
            futures = [pool.submit(self._work, job) for job in self.layout.jobs if job.key not in self._finished]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            except KeyboardInterrupt:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise
            failures = [error for future in done if (error := future.exception()) is not None]
            self._stop.set()
            pool.shutdown(cancel_futures=True)
        if failures:
            raise failures[0]

    def finish(self, overwrite: bool, again: str = "the same command") -> None:
        """Give the folder the output's name. What had it before is removed only then; `again` is for `put_in_place`.

        Raises:
            InputError: a source has changed while it was read, or something has come into the output's place.
            MergeError: the folder cannot get the name.
            OSError: the disk refused.
        """
        if changes := self.read.changes():
            raise InputError(changes)
        shutil.rmtree(self.folder / _SCRATCH, ignore_errors=True)
        put_in_place(self.folder, self.output, overwrite, self.reporter.note, again)

    def _work(self, job: Job) -> None:
        """Do one job: write its bytes into the file, then a line into the journal."""
        checksums = [0] * len(job.extents)
        written = [0] * len(job.extents)
        with self.path(job).open("r+b", buffering=0) as file:
            try:
                for number, raw in self.fill(job):
                    if self._stop.is_set():
                        return  # another worker failed, or the user interrupted
                    with naming(self.path(job)):
                        file.seek(job.extents[number].start + written[number])
                        _write_all(file.fileno(), raw.data)
                    checksums[number] = zlib.crc32(raw.data, checksums[number])
                    written[number] += raw.nbytes
                    self.reporter.bytes_done(raw.nbytes)
            except BaseException:
                self._stop.set()
                raise
            self._pass_on(file.fileno(), job)
        # A kind of job that nothing fills would leave zeros here, and a line in the journal would make them final.
        expected = [extent.nbytes for extent in job.extents]
        if written != expected:
            raise MergeError(f"{job.key}: {written} bytes, not {expected}: a fault of btx-merge, please report it.")
        line = json.dumps({"job": job.key, "crc32": checksums}) + "\n"
        journal = self.folder / JOURNAL
        with self._journal_lock, naming(journal), journal.open("a", encoding="utf-8") as file_of_lines:
            file_of_lines.write(line)
        self._finished.add(job.key)

    def _pass_on(self, descriptor: int, job: Job) -> None:
        """Have the kernel write a job's bytes to the disk now, and forget those of a job some time ago.

        Otherwise they wait in memory, which in the end takes as long, and push out what others have cached.
        """
        for extent in job.extents:
            forget_range(descriptor, extent.start, extent.nbytes)  # not on the disk yet: starts the writing
        self._behind.append(job)
        if len(self._behind) > _LAG:
            with contextlib.suppress(IndexError):  # another thread was quicker
                passed = self._behind.popleft()
                with self.path(passed).open("rb") as file:
                    for extent in passed.extents:
                        forget_range(file.fileno(), extent.start, extent.nbytes)

    def _read_journal(self) -> dict[str, list[int]] | None:
        """Return the finished jobs with their checksums; None if there is no readable journal of this plan."""
        try:
            journal = self.folder / JOURNAL
            text = journal.read_text(encoding="utf-8") if journal.stat().st_size <= _JOURNAL_LIMIT else ""
            first, *lines = text.split("\n")
            if parse_json(first) != {"plan": self.fingerprint}:
                return None
        except (OSError, ValueError):
            return None
        finished = {}
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line may be torn
                entry = parse_json(line)
                finished[entry["job"]] = entry["crc32"]
        return finished

    def _checksums(self, job: Job) -> list[int] | None:
        """Return the checksums of what the file holds in the job's place; None if the file ends before."""
        out = []
        try:
            with self.path(job).open("rb", buffering=0) as file:
                for extent in job.extents:
                    file.seek(extent.start)
                    left, checksum = extent.nbytes, 0
                    while left:
                        piece = file.read(min(left, _READ_BYTES))
                        if not piece:
                            return None
                        checksum = zlib.crc32(piece, checksum)
                        left -= len(piece)
                    out.append(checksum)
        except OSError:
            return None
        return out

    def _start_over(self) -> None:
        """Remove another plan's files from the folder and begin a journal."""
        present = {path.name for path in self.folder.iterdir()} - {LOCK}
        journal = self.folder / JOURNAL
        if present:
            self.reporter.note(
                "Something unfinished of another recipe or of changed sources was there: starting over."
            )
        for name in present - {JOURNAL}:  # the journal last: it marks the folder as ours
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        journal.write_text(json.dumps({"plan": self.fingerprint}) + "\n", encoding="utf-8")

    def _check_room(self, again: str) -> None:
        """Refuse a disk with too little room; what an earlier run wrote, or reserved, takes none any more."""
        present = sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())
        needed = self.layout.bytes_to_write - present
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            found, expected = f"{readable(free)} free", f"{readable(needed)} for the result"
            remedy = f"Make room. {again}" if again else "Make room, or write to another disk."
            raise InputError([Problem("output", str(self.output.parent), found, expected, remedy)])


def _write_all(descriptor: int, view: memoryview) -> None:
    """Write all bytes: the system may take a part of them at a time."""
    while view:
        view = view[os.write(descriptor, view) :]
