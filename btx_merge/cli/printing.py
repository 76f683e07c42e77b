"""What the command prints, line by line. Nothing from outside reaches a terminal but through here and `display`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from btx_merge.errors import Problem
from btx_merge.reporting import MOST_CHARACTERS, Reporter, printable


class Reported(Protocol):
    """What a verb returns."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""


_SECONDS_BETWEEN_LINES = 10
_STYLES = {"error": "red", "warning": "yellow", "note": "", "next": ""}


def error(line: str) -> None:
    """Print why something cannot be done."""
    _tell("error", line)


def warning(line: str) -> None:
    """Print what deserves a look."""
    _tell("warning", line)


def warn(warnings: Iterable[Problem]) -> None:
    """Print warnings, one a line."""
    for problem in warnings:
        warning(str(problem))


class Lines(Reporter):
    """Prints to stderr what a verb tells in words. It has no bars: for `--quiet`, and where nobody looks."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self._began = self._told = 0.0

    def note(self, line: str) -> None:
        """Print something that a person wants to know."""
        _tell("note", line)

    def warn(self, line: str) -> None:
        """Print what deserves a look."""
        warning(line)

    def text_done(self, done: int, of: int) -> None:
        """Print how much of the text is measured."""
        self._tell_how_far(f"measured {done / of:.0%}", done, of)

    def layer_done(self, done: int, of: int) -> None:
        """Print how many layers are fitted."""
        self._tell_how_far(f"fitted {done} of {of} layers", done, of)

    def _tell_how_far(self, work: str, done: int, of: int) -> None:
        """Print how far a verb's work is and how long the rest may take, every ten seconds."""
        now = time.monotonic()
        if done == 0:
            self._began = self._told = now
        elif now - self._told >= _SECONDS_BETWEEN_LINES:
            self._told = now
            left = (now - self._began) * (of - done) / done
            self.line(f"{work}, about {left:.0f} s left")

    def line(self, text: str) -> None:
        """Print how a finetuning goes, unless nobody wants to know."""
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)


def tell_next(result: Path, *first: str) -> None:
    """Print which commands lead on from what a verb has written.

    Args:
        first: those that only the verb itself knows.
    """
    from btx_merge.model.info import next_commands

    for command in (*first, *next_commands(result)):
        _tell("next", command)


def print_json(report: Reported) -> None:
    """Print a report to stdout for a program."""
    print(json.dumps(report.to_dict(), indent=2))


def result(line: str) -> None:
    """Print a line of a report to stdout."""
    print(printable(line))


def _tell(kind: str, line: str) -> None:
    """Print to stderr; the word in colour where that is a terminal, unless NO_COLOR is set."""
    line = printable(line, len(line) if kind == "next" else MOST_CHARACTERS)  # of a command nothing is left out
    if not sys.stderr.isatty():
        print(f"{kind}: {line}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble((f"{kind}:", _STYLES[kind]), f" {line}")
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)
