"""What several commands have: options, such as those of the form `NAME=VALUE`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from btx_merge.errors import InputError, Problem


def option(help: str, *names: str, metavar: str | None = None, choices: Iterable[str] = ()) -> Any:
    """Return an option whose default the help names itself.

    Args:
        choices: what a shell completes its value to.
    """

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return typer.Option(
        *names, help=help, show_default=False, metavar=metavar, autocompletion=complete if choices else None
    )


Model = Annotated[str, typer.Argument(help="Folder or org/name[@revision] of a merged model.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the result.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a folder that is there, once the result is complete.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Threads that read and write [default: one per core, at most 4].")
]
Device = Annotated[str | None, option("Where to fit: cpu, cuda, ... [default: a GPU where there is one].")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings and errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


def pairs(flag: str, items: list[str]) -> dict[str, str]:
    """`NAME=VALUE`, each name once.

    Raises:
        InputError: an item that is none, or a name that came before.
    """
    out: dict[str, str] = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not (name and separator and value):
            raise InputError([Problem("command", flag, item, "NAME=VALUE, such as code=./llama-code")])
        if name in out:
            raise InputError([Problem("command", flag, f"{name} is given twice", "each name once")])
        out[name] = value
    return out


def lists(flag: str, items: list[str]) -> dict[str, list[str]]:
    """`NAME=VALUE`, a name as often as one likes.

    Raises:
        InputError: an item that is none.
    """
    out: dict[str, list[str]] = {}
    for item in items:
        for name, value in pairs(flag, [item]).items():
            out.setdefault(name, []).append(value)
    return out
