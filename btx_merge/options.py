"""How a verb goes about its work. Nothing of it changes a value of the result; what does, a recipe says."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from btx_merge.errors import InputError, Problem
from btx_merge.reporting import first_line, short

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Options:
    """The options of all verbs. A verb refuses those that it has no use for: a merge's file size is in its recipe."""

    overwrite: bool = False
    """Replace the output if it is there and not empty, once the new one is complete."""
    workers: int | None = None
    """Threads that read and write. By default one per core, at most 4."""
    device: str | None = None
    """Device to fit or measure on, such as `cpu` or `cuda`. By default a GPU where there is one."""
    statistics: str | Path | None = None
    """Folder for what a fit collects in its pass over the texts. If it is there already, the texts are not read again:
    only the equations are solved, for instance with another penalty. By default nothing is kept."""
    max_shard_size: str = "5GB"
    """Largest weights file of an export or an extraction, a size such as 5GB, 500MB or 5GiB."""


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


def device_problems(device: str | None) -> list[Problem]:
    """Check that a device can be computed on. Imports torch where one is named."""
    if device is None:
        return []
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = f"{device}: {first_line(error)}"
        return [Problem("command", "--device", found, "a device that torch can use here, such as cpu")]
    return []


def chosen_device(device: str | None) -> torch.device:
    """Return where to compute: the device that is named, or a GPU where there is one."""
    import torch

    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
