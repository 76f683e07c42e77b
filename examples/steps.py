"""Steps that are done once, and what each of them has cost: the bookkeeping of the demos and of the study.

A step fills one folder. It is done again when its command has changed, or a step whose folder the command names, or
the package. What was killed goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

# Read at import. All that the demos use lies on this machine, so no library is to ask a server for it.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
    # Threads that wait for each other give up their core soon: without this, training takes three times as
    # long where another program keeps one of two cores busy.
    "GOMP_SPINCOUNT": "1000",
}

from rich.console import Console

from btx_merge.cli.app import app
from btx_merge.finetuning.work_folder import last_checkpoint, work_folder

ROOT = Path(__file__).resolve().parent.parent
console = Console(highlight=False)


@dataclass(frozen=True)
class Cost:
    """What a step took."""

    key: str
    cpu_seconds: float
    seconds: float


class Steps:
    """A folder of finished steps."""

    is_quiet = False
    """Whether commands that run are all that is printed: neither what they say, nor what is finished."""

    def __init__(self, folder: Path, *given: object):
        """Open a folder, and remember which of its steps are finished.

        Args:
            given: what all steps depend on, beside the package.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.began = folder, time.perf_counter()
        self._record = folder / "steps.json"
        known = json.loads(self._record.read_text()) if self._record.exists() else {}
        self.finished = {name: Cost(**cost) for name, cost in known.items()}
        self._given = (package_fingerprint(), *given)

    def step(self, output: Path, what: object, build: Callable[[], object], reads: Sequence[str] = ()) -> Path:
        """Have `build` fill `output`, unless that was done before.

        Args:
            what: all that decides the result, beside what was given to all steps.
            reads: words that name, among others, what earlier steps have filled.
        """
        parent = multiprocessing.parent_process()
        if parent and not parent.is_alive():
            sys.exit("the study that this run is a part of was stopped")
        name, key = str(output.relative_to(self.folder)), fingerprint(self._given, what, self._keys_in(reads))
        cost = self.finished.pop(name, None)
        if cost and cost.key == key and output.exists():
            self.finished[name] = cost
            self._say("finished by an earlier run")
            return output
        self._save()
        begun = output.with_name(f"{output.name}.begun")
        if not begun.exists() or begun.read_text() != key:  # what was begun under another key is not gone on with
            shutil.rmtree(work_folder(output), ignore_errors=True)
            begun.parent.mkdir(parents=True, exist_ok=True)
            begun.write_text(key)
        with stopwatch() as took:
            build()
        self.finished[name] = Cost(key, *took)
        self._save()
        begun.unlink()
        self._say(f"{took[1]:.0f} s")
        return output

    def btx(self, output: Path, *words: str) -> Path:
        """Run a command of `btx` that writes the folder `output`, as a terminal would.

        A training that was ended in its midst goes on from its last checkpoint.
        """
        line = ["btx", *words, "-o", shown(output)]
        title = f"\n[bold]$ {shlex.join(line)}[/]"

        def build() -> None:
            more = ["--overwrite"]
            if self.is_quiet:
                console.print(title, soft_wrap=True)
                more.append("--quiet")
            if last_checkpoint(work_folder(output)):
                more.append("--resume")
            if code := app([*line[1:], *more], standalone_mode=False):
                sys.exit(code)

        if not self.is_quiet:
            console.print(title, soft_wrap=True)
        return self.step(output, line, build, words)

    def cost(self, outputs: Sequence[Path] | None = None) -> Cost:
        """Add up what some steps took, or all."""
        names = self.finished if outputs is None else [str(output.relative_to(self.folder)) for output in outputs]
        costs = [self.finished[name] for name in names]
        return Cost("", sum(cost.cpu_seconds for cost in costs), sum(cost.seconds for cost in costs))

    def _say(self, line: str) -> None:
        if not self.is_quiet:
            console.print(line, style="dim")

    def _keys_in(self, words: Sequence[str]) -> list[str]:
        """Return the keys of the finished steps whose folders, or files in them, are named."""
        keys = []
        for word in words:
            path = ROOT / word.split("=")[-1]
            for folder in (path, *path.parents):
                if folder.is_relative_to(self.folder):
                    found = self.finished.get(str(folder.relative_to(self.folder)))
                    keys += [found.key] if found else []
        return keys

    def _save(self) -> None:
        made = self._record.with_suffix(".new")
        made.write_text(json.dumps({name: asdict(cost) for name, cost in self.finished.items()}, indent=1))
        made.replace(self._record)  # a kill leaves the old record or the new one


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Measure CPU seconds, those of ended children included, and seconds; both are in the list afterwards."""
    took: list[float] = []
    began, cpu = time.perf_counter(), sum(os.times()[:4])
    yield took
    took += [sum(os.times()[:4]) - cpu, time.perf_counter() - began]


def shown(path: Path) -> str:
    """Return a path as the commands give it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def fingerprint(*parts: object) -> str:
    """Return a key for work: what goes into it, by its `repr`."""
    return hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest()


def package_fingerprint() -> str:
    """Return a key for the code that models and texts are made with; the commands have keys of their own."""
    files = [file for folder in ("btx_merge", "modeling") for file in sorted((ROOT / folder).rglob("*.py"))]
    files += [ROOT / "examples" / name for name in ("demo_common.py", "demo_texts.py", "reproduce_texts.py")]
    return fingerprint([(str(file.relative_to(ROOT)), file.read_text("utf-8")) for file in files])
