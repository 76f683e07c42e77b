"""What the command prints, line by line. Nothing from outside reaches a terminal but through here and `tables`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from btx_merge.errors import Problem
from btx_merge.reporting import printable

_STYLES = {"error": "red", "warning": "yellow", "note": "", "next": ""}


def error(line: str) -> None:
    """Print why something cannot be done."""
    _tell("error", line)


def warning(line: str) -> None:
    """Print what deserves a look."""
    _tell("warning", line)


def note(line: str) -> None:
    """Print something that a person wants to know, where nothing else is printed."""
    _tell("note", line)


def warn(warnings: Iterable[Problem]) -> None:
    """Print warnings, one a line."""
    for problem in warnings:
        warning(str(problem))


def tell_next(result: Path) -> None:
    """Print which commands lead on from what a verb has written."""
    from btx_merge.model.info import next_commands

    for command in next_commands(result):
        _tell("next", command)


def result(line: str) -> None:
    """Print a line of a report to stdout."""
    print(printable(line))


def _tell(kind: str, line: str) -> None:
    """Print to stderr; the word in colour where that is a terminal, unless NO_COLOR is set."""
    line = printable(line)
    if not sys.stderr.isatty():
        print(f"{kind}: {line}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble((f"{kind}:", _STYLES[kind]), f" {line}")
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)
