"""Who answers Ctrl-C: until a command begins it ends the process at once, then it is Python's KeyboardInterrupt.

Importing what the command needs takes a second, and nothing is written yet. An exception out of a half-imported module
may be caught there, or become another; and typer, which reads the arguments, swallows it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


def _end(number: int, frame: object) -> None:
    os.write(2, b"error: Interrupted.\n")
    os._exit(130)


def end_at_once() -> None:
    """Have Ctrl-C end the process in one line from now on; not under nohup, where it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


@contextmanager
def keyboard_interrupts() -> Iterator[None]:
    """Have Ctrl-C raise KeyboardInterrupt meanwhile, if it would end the process."""
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _end)
