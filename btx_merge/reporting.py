"""What a verb tells while it works; text from outside, made fit to be shown; and sizes.

Such text is shown on one line, without control characters, of a bounded length.
"""

from __future__ import annotations

import os
import re
import reprlib
import resource
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST_CHARACTERS = 4000  # some fifty lines of a terminal; the longest path that Linux takes has 4096
_MOST_BITS = 1000  # Python refuses to write out integers of more than 4300 digits


class Reporter:
    """Is told by every verb how its work goes, and keeps it to itself. A subclass overrides what it wants to hear."""

    def note(self, line: str) -> None:
        """Take a line about what else a person would want to know, such as an earlier, unfinished run."""

    def warn(self, line: str) -> None:
        """Take a line about what deserves a look. What was known before the work is in the report too."""

    def started(self, nbytes: int) -> None:
        """Take what the calls of `bytes_done` will add up to, once before the first of them."""

    def bytes_done(self, nbytes: int) -> None:
        """Take a number of bytes that became final. Called from several threads."""

    def layer_done(self, done: int, of: int) -> None:
        """Take how many layers of how many are fitted; the first call has none."""

    def step_done(self, done: int, of: int) -> None:
        """Take how many steps of how many a finetuning has done; the first call comes before a step."""

    def text_done(self, done: int, of: int) -> None:
        """Take how many bytes of text of how many are measured, over all models; the first call has none."""

    def line(self, text: str) -> None:
        """Take a line by which a person follows a finetuning: losses, perplexities, loads."""


def printable(text: str, most: int = MOST_CHARACTERS) -> str:
    r"""Return the text with what cannot be seen as escapes (`\n`, `\x1b`, `\u202e`), cut in the middle if it is long.

    A name in a checkpoint can hold anything: an escape sequence that rewrites the terminal, a line end behind which a
    forged message begins, a mark that turns the direction of writing.
    """
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def pasted(word: str) -> str:
    r"""Return a path or a name as a word of a command that can be pasted into bash or zsh; all of it can be seen.

    >>> print(pasted("it's mine"), pasted("-o"), pasted("two\nlines"))
    'it'"'"'s mine' ./-o $'two\x0alines'
    """
    if word.startswith("-"):
        word = f"./{word}"  # no option
    if word.isprintable():
        return shlex.quote(word)
    letters = []
    for letter in word:
        if letter.isprintable():
            letters.append(f"\\{letter}" if letter in "\\'" else letter)
        else:
            letters += [f"\\x{byte:02x}" for byte in os.fsencode(letter)]
    return f"$'{''.join(letters)}'"


def short(value: Any) -> str:
    """Return a value as Python writes it, shortened where it is long, deep or expands without end."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    """`reprlib` with room for a path, and for integers that Python does not write out."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 300, 300

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() > _MOST_BITS:
            return f"a whole number of {value.bit_length()} bits"
        return super().repr_int(value, level)


_SHORT = _Short()


def first_line(error: BaseException) -> str:
    """Return the first line of what an error of another library says; the others are for its authors."""
    return str(error).strip().split("\n")[0]


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Hide the bars that transformers draws while it loads a model: a verb has its own."""
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def peak_memory() -> int:
    """Return the most memory that this process has held, in bytes.

    Linux's own account is read where there is one: getrusage counts what the parent had before the exec.
    """
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def counted(number: int, what: str) -> str:
    """Return how many there are of something.

    >>> counted(1, "expert"), counted(1_200, "token")
    ('1 expert', '1,200 tokens')
    """
    return f"{number:,} {what}{'s' * (number != 1)}"


def readable(nbytes: int) -> str:
    """Return a number of bytes in the largest unit that leaves a digit before the point.

    >>> readable(8_400_000)
    '8.40 MB'
    """
    for unit, name in ((1_000_000_000, "GB"), (1_000_000, "MB"), (1000, "KB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes} bytes"
