"""How the commands take options that come again and again as `NAME=VALUE`."""

from __future__ import annotations

import sys
from typing import Any

import typer

from btx_merge.errors import InputError, Problem


def option(help: str, *names: str, metavar: str | None = None) -> Any:
    """An option whose default the help names itself."""
    return typer.Option(*names, help=help, show_default=False, metavar=metavar)


def note(line: str) -> None:
    """Tells a person something, where nothing else is printed."""
    print(f"note: {line}", file=sys.stderr)


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
