"""The folder in which a finetuning works until its result is whole, and what is kept there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from btx_merge.errors import InputError, Problem
from btx_merge.files.placing import leads_elsewhere

SUFFIX = ".btx-training"
COMPLETE = "complete"
"""The file that is written last: a checkpoint without it was torn by whatever ended the process."""
_RUN_FILE = "run.json"
_LOCK = "lock"
_FREE_TO_CHANGE = {  # of the arguments, what may differ when a run is continued
    *("logging_steps", "logging_first_step", "save_steps", "save_total_limit", "eval_steps", "report_to", "run_name"),
    *("disable_tqdm", "log_level", "project", "sources"),
}


def work_folder(target: Path) -> Path:
    """Return the folder in which the run for an output works."""
    return target.with_name(target.name + SUFFIX)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def what_is_kept(folder: Path) -> str:
    """Return the sentence that tells somebody whose run ended early how to go on."""
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        return "No checkpoint was finished, so nothing is kept: the same command begins anew."
    step = checkpoint.name.rpartition("-")[2]
    return f"Step {step} is kept in {checkpoint}: the same command with --resume continues from there."


@contextmanager
def held(folder: Path, verb: str) -> Iterator[None]:
    """Make a run's folder and keep it for this process alone.

    Args:
        verb: the command's, for the error.

    Raises:
        InputError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError([_problem_of_two(folder, verb)]) from None
    try:
        yield
    finally:
        lock.release()


def folder_problems(folder: Path, resume: bool, is_first: bool, verb: str) -> list[Problem]:
    """Return why a run cannot begin, or go on, in a folder. Nothing is changed.

    Args:
        is_first: whether this is the first of the run's ranks. It is the one that holds the folder.
        verb: the command's.
    """
    if is_first and (problem := leads_elsewhere(folder)):
        return [problem]
    if is_first and (folder / _LOCK).exists():
        try:
            with FileLock(folder / _LOCK, timeout=0):
                pass
        except Timeout:
            return [_problem_of_two(folder, verb)]
    checkpoint, where = last_checkpoint(folder), str(folder)
    if resume and checkpoint is None:
        remedy = "Leave out --resume, which begins anew."
        return [Problem("output", where, "no finished checkpoint to resume", "", remedy)]
    if not resume and checkpoint is not None:
        remedy = "--resume continues it; remove the folder to begin anew."
        return [Problem("output", where, "holds a run that was not finished", "", remedy)]
    left = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if left - {_LOCK} and _RUN_FILE not in left:
        return [Problem("output", where, "holds files, but no unfinished run", "", "Move it away.")]
    return []


def _problem_of_two(folder: Path, verb: str) -> Problem:
    found, remedy = f"another run of btx {verb} works there now", "Wait for it, stop it, or give another --output."
    return Problem("output", str(folder), found, "", remedy)


def begin(folder: Path, recipe: Mapping[str, Any], settings: Mapping[str, Any], resume: bool, digest: str) -> None:
    """Write down which run the folder is of; a run that is continued must be the same.

    Args:
        recipe: its values by name.
        settings: the Trainer's arguments that determine the run.
        digest: says which weights the model has (`model_digest`).

    Raises:
        InputError: what differs.
    """
    values = json.loads(json.dumps({**recipe, "arguments": dict(settings), "digest": digest}))
    file = folder / _RUN_FILE
    if not resume:
        for left in folder.iterdir():  # by a run that came to no checkpoint
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != _LOCK:
                left.unlink()
        file.write_text(json.dumps(values, indent=2), encoding="utf-8")
        return
    for torn in folder.glob("checkpoint-*"):
        if not (torn / COMPLETE).exists():
            shutil.rmtree(torn)
    before = json.loads(file.read_text(encoding="utf-8"))
    flat = [{**run, **run["arguments"]} for run in (before, values)]
    problems = [
        Problem("resume", name, f"{flat[1].get(name)!r}", f"{flat[0].get(name)!r}, as the run began")
        for name in dict.fromkeys([*flat[0], *flat[1]])
        if name not in ("arguments", "digest", *_FREE_TO_CHANGE) and flat[0].get(name) != flat[1].get(name)
    ]
    if not problems and before.get("digest", digest) != digest:
        found, expected = "its weights are not those that the run began with", "the same model"
        remedy = f"Put that model there again, or remove {folder} and begin anew without --resume."
        problems.append(Problem("model", str(recipe["model"]), found, expected, remedy))
    if problems:
        raise InputError(problems)


def tools() -> dict[str, str]:
    """Return the versions of the libraries that a run uses."""
    return {name: version(name) for name in ("btx-merge", "torch", "transformers", "accelerate", "peft")}
