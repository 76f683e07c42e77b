"""How a verb goes about its work. Nothing of it changes a value of the result; what does, a recipe says."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from btx_merge.errors import InputError, Problem
from btx_merge.reporting import short


@dataclass(frozen=True)
class Options:
    """The options of all verbs. A verb refuses those that it has no use for."""

    overwrite: bool = False
    """Whether the output may be replaced if it is there and not empty; that happens when the new one is complete."""
    workers: int | None = None
    """Threads that read and write; by default one per core, at most 4."""
    device: str | None = None
    """Where to fit: `cpu`, `cuda`, ...; by default a GPU where there is one."""
    statistics: str | Path | None = None
    """Of a merge or a fit: a folder for what the pass over the texts collects. Where it has them already, nothing is
    passed through the model again: for another `router_ridge`."""
    max_shard_size: str = "5GB"
    """Of an export or an extraction: the largest weights file, such as 5GB or 500MB. A merge has it in its recipe."""


def refuse_unused(options: Options, verb: str, *used: str) -> None:
    """Refuse options that a verb would pass over.

    Raises:
        InputError: each option that is given and not among the used ones.
    """
    expected = f"only {', '.join(used)}"
    problems = []
    for item in fields(options):
        value = getattr(options, item.name)
        if value != item.default and item.name not in used:
            problems.append(Problem("options", item.name, f"{short(value)}, which {verb} has no use for", expected))
    if problems:
        raise InputError(problems)
