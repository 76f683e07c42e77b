"""The options that several verbs have. Fields are described by their docstrings."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from btx_merge.fitting.recipe import FitRecipe
from btx_merge.options import Options
from btx_merge.values import field_descriptions


def option(help: str, *names: str, metavar: str | None = None, values: Collection[str] = ()) -> Any:
    """Return an option whose default the help names itself.

    Args:
        values: what a shell completes its value to.
    """

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return typer.Option(
        *names, help=help, show_default=False, metavar=metavar, autocompletion=complete if values else None
    )


def described(cls: type, name: str, more: str = "") -> str:
    """Return what `--help` says of a field: its docstring, with flags in place of other fields' names; its default.

    Args:
        more: what `--help` says between them.
    """
    flags = {item.name: flag_of(item) for item in fields(cls)}
    text = re.sub(r"`([^`]+)`", lambda match: flags.get(match[1], match[1]), field_descriptions(cls)[name]) + more
    (default,) = (item.default for item in fields(cls) if item.name == name)
    if isinstance(default, (str, int, float)) and default is not False:
        text += f" [default: {'yes' if default is True else default}]"
    return text


def is_several(item: Field[Any]) -> bool:
    """Return whether a field holds several values. Its flag is given again for each."""
    return str(item.type).startswith(("tuple[", "Mapping["))


def flag_of(item: Field[Any]) -> str:
    """Return the flag of a field; that of several values is in the singular: `prompts` is `--prompt`."""
    name = item.name.removesuffix("s") if is_several(item) else item.name
    return f"--{name.replace('_', '-')}"


Model = Annotated[str, typer.Argument(help=described(FitRecipe, "model"))]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the result.")]
Overwrite = Annotated[bool, option(described(Options, "overwrite"), "--overwrite")]
Workers = Annotated[int | None, typer.Option(min=1, help=described(Options, "workers"))]
Device = Annotated[str | None, option(described(Options, "device"))]
Statistics = Annotated[Path | None, option(described(Options, "statistics"))]
MaxShardSize = Annotated[str, option(described(Options, "max_shard_size"))]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings and errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
