"""Folders that no result may take the place of, whatever `--overwrite` says: it would remove all that they hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from btx_merge.errors import Problem

_RESULTS = (
    "config.json",
    "adapter_config.json",
    "btx_*.yaml",
    "eval.json",
    "routing.json",
    "*.safetensors",
    "*.gguf",
)
"""Files of which a folder that one of the verbs has written, or a model's, holds at least one."""


def foreign_problem(target: Path) -> Problem | None:
    """Return why an output may not be replaced, not even on request: it is a folder of other things than our results.

    A slip of the hand in a path would otherwise remove somebody's work.
    """
    if not target.is_dir() or not any(target.iterdir()) or any(any(target.glob(name)) for name in _RESULTS):
        return None
    found = "not empty, and it holds neither a model nor a report"
    remedy = "Give another --output, or remove the folder yourself."
    return Problem("output", str(target), found, "a new folder, an empty one or an earlier result", remedy)


def precious_problem(target: Path) -> Problem | None:
    """Return why an output may not have this place: it is, or holds, somebody's home or the folder of the command.

    A shell expands `~`, and a script an unset variable, to a folder that nobody means to give up.
    """
    known: tuple[tuple[str, Callable[[], Path]], ...] = (
        ("your home folder", Path.home),
        ("the folder that the command runs in", Path.cwd),
    )
    for name, find in known:
        try:
            place = find().resolve()
        except (OSError, RuntimeError):  # nobody's home, or a folder that is gone
            continue
        if target == place or target in place.parents:
            found = f"is {name}" if target == place else f"holds {name}, {place}"
            expected = "a folder for this result alone"
            return Problem("output", str(target), found, expected, "Give another --output, such as ./merged.")
    return None
