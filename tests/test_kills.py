"""kill -9 at random moments of every verb that writes a model: no torn result, and the same command completes it."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from btx_merge import EditRecipe, FitRecipe, MergeRecipe, Options, edit, export, extract, fit, merge
from tests.support.common import Told, files_of, grow, save_seed

KILLS = 40
"""For each verb."""

Note = Callable[[str], None]


def run_merge(root: Path, out: Path, note: Note) -> None:
    recipe = MergeRecipe(str(root / "seed"), {name: str(root / name) for name in ("code", "math")})
    merge(recipe, out, Options(overwrite=True), reporter=Told(note=note))


def run_edit(root: Path, out: Path, note: Note) -> None:
    recipe = EditRecipe(str(root / "btx"), add={"bio": str(root / "bio")}, drop=("code",))
    edit(recipe, out, Options(overwrite=True), reporter=Told(note=note))


def run_export(root: Path, out: Path, note: Note) -> None:
    export(str(root / "btx"), out, Options(overwrite=True), reporter=Told(note=note))


def run_extract(root: Path, out: Path, note: Note) -> None:
    extract(str(root / "btx"), "math", out, Options(overwrite=True), reporter=Told(note=note))


def run_fit(root: Path, out: Path, note: Note) -> None:
    recipe = FitRecipe(str(root / "btx"), method="prompts", prompts={"code": ["w1 w2 w3"], "math": ["w4 w5"]})
    fit(recipe, out, Options(overwrite=True), reporter=Told(note=note))


VERBS = {"merge": run_merge, "edit": run_edit, "export": run_export, "extract": run_extract, "fit": run_fit}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """7 MB a source, so that there is something to interrupt."""
    folder = tmp_path_factory.mktemp("kills")
    seed = save_seed(folder / "seed", hidden_size=256, intermediate_size=768, vocab_size=1500)
    for number, name in enumerate(("code", "math", "bio"), 1):
        grow(seed, folder / name, random_seed=number)
    run_merge(folder, folder / "btx", print)
    return folder


@pytest.fixture(scope="module")
def processes():
    """New processes that have imported everything: a kill meets the verb, and not the import of torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.test_kills", "transformers", "btx_merge.fitting.walk", "btx_merge.modeling"]
    )
    return context


def begin(verb: str, root: Path, out: Path, connection: Connection) -> None:
    """What such a process does."""
    connection.send("begun")
    VERBS[verb](root, out, lambda line: None)
    connection.send("done")


def ended_after(processes: Any, seconds: float | None, verb: str, root: Path, out: Path) -> tuple[bool, float]:
    """Run a verb and kill it; return whether the kill came before its end, and how long it ran."""
    ours, theirs = processes.Pipe()
    process = processes.Process(target=begin, args=(verb, root, out, theirs))
    process.start()
    assert ours.recv() == "begun"
    began = time.perf_counter()
    if ours.poll(seconds):
        assert ours.recv() == "done"
    else:
        process.kill()
    ran = time.perf_counter() - began
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0, ran


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_killed_at_random_moments(root, processes, tmp_path, record_property, verb):
    """Up to three kills in a row of one command, then that command in peace; half of them over an old model."""
    ended_after(processes, None, verb, root, tmp_path / "warm")  # the first starts the server
    _, seconds = ended_after(processes, None, verb, root, tmp_path / "whole")
    expected = files_of(tmp_path / "whole")
    assert files_of(tmp_path / "warm") == expected
    rng, seen = random.Random(verb), Counter()
    out = tmp_path / "place" / "out"
    while seen["kills"] < KILLS:
        out.parent.mkdir()
        old = {"old.safetensors": b"precious"} if rng.random() < 0.5 else {}
        if old:
            out.mkdir()
            (out / "old.safetensors").write_bytes(old["old.safetensors"])
        for _ in range(rng.randint(1, 3)):
            killed, _ = ended_after(processes, rng.uniform(0, 1.05 * seconds), verb, root, out)
            seen["kills"] += killed
            seen["too late"] += not killed
            present = files_of(out) if out.exists() else {}
            is_whole = expected.items() <= present.items() and present.keys() - expected.keys() <= {
                "btx_journal.jsonl",
                "btx_lock",
            }
            assert is_whole or present == old
            seen["had its name when killed"] += killed and is_whole
        notes: list[str] = []
        VERBS[verb](root, out, notes.append)
        seen["completed"] += 1
        seen["resumed"] += any(note.startswith("Continuing") for note in notes)
        assert files_of(out) == expected
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        shutil.rmtree(out.parent)
    seen["began anew"] = seen["completed"] - seen["resumed"]
    print(f"\n{verb}: {seconds:.2f} s undisturbed; {dict(seen)}")
    for key, value in seen.items():
        record_property(key, value)
