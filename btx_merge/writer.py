"""Carries out a plan: streams the bytes, resumes, and finishes in one step.

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
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from btx_merge.errors import InputError, MergeError, MergeInterrupted, Problem
from btx_merge.layout import Block, Job, Layout
from btx_merge.pagecache import forget_range

JOURNAL = "btx_journal.jsonl"
_LOCK = "btx_lock"
_READ_BYTES = 1 << 20
_LAG = 8  # jobs that are left to the disk before they are let go of

Progress = Callable[[int], None]
"""Called, from several threads, with the number of bytes that became final."""
Fill = Callable[[Job], Iterator[Block]]
"""The bytes of a job in order, each for one of its extents."""


def check_target(target: Path, overwrite: bool) -> None:
    """Refuses an output that is no folder, or that holds something which may not be replaced."""
    file = next((path for path in (target, *target.parents) if path.is_file()), None)
    if file is not None:
        raise InputError([Problem("output", str(file), "a file", "a folder that is empty or not there yet")])
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        remedy = "Give another --output, or --overwrite to replace it when the new model is complete."
        raise InputError([Problem("output", str(target), "not empty", "an empty or a new folder", remedy)])


def put_in_place(folder: Path, target: Path, overwrite: bool) -> Path | None:
    """Gives a complete folder the target's name. What had it before is returned, for the caller to remove.

    Raises:
        InputError: something that may not be replaced has come into the target's place meanwhile.
    """
    check_target(target, overwrite)
    old = None
    if target.exists() and any(target.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=target.name + ".btx-old-", dir=target.parent))
        target.rename(old)
    elif target.exists():
        target.rmdir()
    try:
        folder.rename(target)
    except OSError:
        if old:
            old.rename(target)
        raise
    return old


@contextlib.contextmanager
def continuable(output: Path) -> Iterator[None]:
    """Turns a disk's refusal into a `MergeError`: what is finished is kept, and the same command continues."""
    try:
        yield
    except OSError as error:
        remedy = "What is finished is kept: the same command continues."
        raise MergeError(f"{error.filename or output}: {error.strerror or error}. {remedy}") from error


def fingerprint(layout: Layout, files: Iterable[tuple[str, Path]], *what: Any) -> str:
    """Says whether something unfinished is of these files, with their labels, of this layout and this version.

    Args:
        what: else the bytes depend on; plain values.
    """
    stats = [[label, (stat := file.stat()).st_size, stat.st_mtime_ns] for label, file in files]
    text = json.dumps([version("btx-merge"), what, stats, [shard.nbytes for shard in layout.shards]])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Staging:
    """The folder beside the target in which a merge is written. Use as a context: it is locked meanwhile."""

    def __init__(self, output: Path, layout: Layout, fill: Fill, fingerprint: str):
        """
        Args:
            fingerprint: of everything that the bytes depend on; what another one left unfinished is thrown away.
        """
        self.output = output
        self.folder = output.with_name(output.name + ".btx-partial")
        self.layout, self.fill, self.fingerprint = layout, fill, fingerprint
        self.restarted = False
        """Whether an unfinished merge of something else was found and thrown away."""
        self.kept_bytes = 0
        """Bytes of an earlier run that were verified and kept."""
        self._finished: set[str] = set()
        self._journal_lock = threading.Lock()
        self._stop = threading.Event()
        self._behind: collections.deque[Job] = collections.deque()

    def __enter__(self) -> Staging:
        self.folder.mkdir(parents=True, exist_ok=True)
        present = {path.name for path in self.folder.iterdir()}
        if present - {_LOCK} and JOURNAL not in present:
            found, remedy = "holds files, but no unfinished merge", "Move it away."
            raise InputError([Problem("output", str(self.folder), found, "", remedy)])
        self._lock = FileLock(self.folder / _LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            found = "another merge is writing it now"
            raise InputError([Problem("output", str(self.folder), found, "", "Wait for it or stop it.")]) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def path(self, job: Job) -> Path:
        """The file that a job writes to."""
        return self.folder / self.layout.shards[job.tensor.shard].name

    def write(
        self,
        workers: int | None,
        progress: Progress | None,
        on_note: Callable[[str], None] | None,
    ) -> None:
        """Fills all files of weights, but for what an earlier run finished, of which `on_note` is told.

        Args:
            workers: threads; by default one per core, at most 4.

        Raises:
            InputError: the disk has too little room, or the folder holds something else.
            NonFiniteError: a NaN or an Inf was met, and the recipe does not allow it.
            OSError: the disk refused.
            MergeInterrupted: Ctrl-C.
        """
        self._prepare()
        if on_note and self.restarted:
            on_note("Something unfinished of another recipe or of changed sources was there: starting over.")
        if on_note and self.kept_bytes:
            on_note(f"Continuing: {self.kept_bytes / 1e9:.2f} GB were written before and are verified.")
        self._run(workers or min(4, os.cpu_count() or 1), progress or (lambda nbytes: None))

    def _prepare(self) -> None:
        """Finds out what an earlier run finished, and makes room for the rest."""
        recorded = self._read_journal()
        if recorded is None:
            self._start_over()
        jobs = {job.key: job for job in self.layout.jobs}
        for key, checksums in (recorded or {}).items():
            if key in jobs and self._checksums(jobs[key]) == checksums:
                self._finished.add(key)
                self.kept_bytes += jobs[key].nbytes
        self._check_room()
        for shard in self.layout.shards:
            with (self.folder / shard.name).open("ab") as file:
                file.truncate(shard.nbytes)
                if hasattr(os, "posix_fallocate"):
                    with contextlib.suppress(OSError):  # a file system that cannot reserve still can write
                        os.posix_fallocate(file.fileno(), 0, shard.nbytes)
            with (self.folder / shard.name).open("r+b") as file:
                file.write(shard.header)

    def _run(self, workers: int, progress: Progress) -> None:
        """Writes everything that is not finished yet."""
        progress(self.kept_bytes)
        with ThreadPoolExecutor(workers, "btx-writer") as pool:
            futures = [
                pool.submit(self._work, job, progress) for job in self.layout.jobs if job.key not in self._finished
            ]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            except KeyboardInterrupt:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise MergeInterrupted from None
            failures = [error for future in done if (error := future.exception()) is not None]
            self._stop.set()
            pool.shutdown(cancel_futures=True)
        for failure in failures:
            raise failure

    def finish(self, overwrite: bool) -> None:
        """Gives the folder the target's name. What had it before is removed only then.

        Raises:
            InputError: something has come into the target's place meanwhile.
        """
        for path in self.folder.rglob("*"):
            if path.is_file() and path.name not in (_LOCK, JOURNAL):
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        old = put_in_place(self.folder, self.output, overwrite)
        for name in (JOURNAL, _LOCK):
            (self.output / name).unlink(missing_ok=True)
        if old:
            shutil.rmtree(old, ignore_errors=True)

    def _work(self, job: Job, progress: Progress) -> None:
        """One job: its bytes into the file, then a line in the journal."""
        checksums = [0] * len(job.extents)
        written = [0] * len(job.extents)
        with self.path(job).open("r+b", buffering=0) as file:
            try:
                for number, raw in self.fill(job):
                    if self._stop.is_set():
                        return  # another worker failed, or the user interrupted
                    file.seek(job.extents[number].start + written[number])
                    _write_all(file.fileno(), raw.data)
                    checksums[number] = zlib.crc32(raw.data, checksums[number])
                    written[number] += raw.nbytes
                    progress(raw.nbytes)
            except BaseException:
                self._stop.set()
                raise
            self._pass_on(file.fileno(), job)
        assert written == [extent.nbytes for extent in job.extents], job.key
        line = json.dumps({"job": job.key, "crc32": checksums}) + "\n"
        with self._journal_lock, (self.folder / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(line)

    def _pass_on(self, descriptor: int, job: Job) -> None:
        """Has the kernel write a job's bytes to the disk now, and forget those of a job some time ago.

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
        """Finished jobs and their checksums; None where there is no journal of this plan."""
        try:
            lines = (self.folder / JOURNAL).read_text(encoding="utf-8").split("\n")
            if json.loads(lines[0]) != {"plan": self.fingerprint}:
                return None
        except (OSError, ValueError):
            return None
        finished = {}
        for line in lines[1:]:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line may be torn
                entry = json.loads(line)
                finished[entry["job"]] = entry["crc32"]
        return finished

    def _checksums(self, job: Job) -> list[int] | None:
        """What the file holds where the job writes; None where the file ends before."""
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
        """Empties the folder of another plan's files and begins a journal."""
        present = {path.name for path in self.folder.iterdir()} - {_LOCK}
        journal = self.folder / JOURNAL
        self.restarted = bool(present)
        for name in present - {JOURNAL}:  # the journal last: it marks the folder as ours
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        journal.write_text(json.dumps({"plan": self.fingerprint}) + "\n", encoding="utf-8")

    def _check_room(self) -> None:
        present = sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())
        needed = self.layout.bytes_to_write - present
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            found, expected = f"{free / 1e9:.2f} GB free", f"{needed / 1e9:.2f} GB for the result"
            remedy = "Make room, or write to another disk."
            raise InputError([Problem("output", str(self.output.parent), found, expected, remedy)])


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]
