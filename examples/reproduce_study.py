"""The bookkeeping of `reproduce.py`: steps that are done once, and what each of them has cost.

A step fills one folder. It is done again when its command has changed, or a step whose folder the command names, or
the package. A study that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from demo_common import ROOT, console, fingerprint, package_fingerprint, run_btx, shown

from btx_merge import info


@dataclass(frozen=True)
class Cost:
    """What a step took."""

    key: str
    cpu_seconds: float
    seconds: float


class Study:
    """A folder of finished steps."""

    def __init__(self, folder: Path, *given: object):
        """Open a folder, and remember which of its steps are finished.

        Args:
            given: what all steps depend on, beside the package.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._record = folder / "finished.json"
        known = json.loads(self._record.read_text()) if self._record.exists() else {}
        self.finished = {name: Cost(**cost) for name, cost in known.items()}
        self._given = (package_fingerprint(), *given)

    def step(self, output: Path, what: object, build: Callable[[], object]) -> Path:
        """Have `build` fill `output`, unless that was done before.

        Args:
            what: all that decides the result, beside what was given to all steps.
        """
        parent = multiprocessing.parent_process()
        if parent and not parent.is_alive():
            sys.exit("the study that this run is a part of was stopped")
        name, key = str(output.relative_to(self.folder)), self._key(what)
        cost = self.finished.get(name)
        if cost is None or cost.key != key or not output.exists():
            self.finished.pop(name, None)
            with stopwatch() as took:
                build()
            self.finished[name] = Cost(key, *took)
            self._save()
        return output

    def btx(self, output: Path, *words: str) -> Path:
        """Run a command of `btx` that writes the folder `output`."""
        line = ["btx", *words, "-o", shown(output)]
        what = (line, self._keys_in(words))

        def build() -> None:
            console.print(f"\n[bold]$ {shlex.join(line)}[/]", soft_wrap=True)
            run_btx([*line[1:], "--quiet"], output, self._key(what))

        return self.step(output, what, build)

    def cost(self, outputs: Sequence[Path] | None = None) -> Cost:
        """Add up what some steps took, or all."""
        names = self.finished if outputs is None else [str(output.relative_to(self.folder)) for output in outputs]
        costs = [self.finished[name] for name in names]
        return Cost("", sum(cost.cpu_seconds for cost in costs), sum(cost.seconds for cost in costs))

    def _key(self, what: object) -> str:
        return fingerprint(self._given, what)

    def _keys_in(self, words: Sequence[str]) -> list[str]:
        """Return the keys of the finished steps whose folders, or files in them, a command reads."""
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


def active_parameters(model: Path) -> int:
    """Return the parameters that one token meets: all of a dense model, the shared and K experts of a merged one."""
    if json.loads((model / "config.json").read_text())["model_type"] == "btx":
        return info(str(model)).active_parameters
    from transformers import AutoModelForCausalLM

    return int(AutoModelForCausalLM.from_pretrained(model).num_parameters())
