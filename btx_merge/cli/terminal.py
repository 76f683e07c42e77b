"""What stands around a verb's work in the command: somebody who watches it, and who may end it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from btx_merge.cli.printing import Lines
from btx_merge.reporting import Reporter


@contextmanager
def terminal(quiet: bool, verb: str = "writing") -> Iterator[Reporter]:
    """Yield what prints how a verb's work goes; with bars where stderr is a terminal. SIGTERM ends it like Ctrl-C.

    Args:
        verb: what is done with bytes, as a bar says it.
    """
    end_like_ctrl_c()
    if quiet or not sys.stderr.isatty():
        yield Lines(quiet)
        return
    from btx_merge.cli.display import Bars

    bars = Bars(verb)
    try:
        yield bars
    finally:
        bars.stop()


def hush(quiet: bool) -> None:
    """Keep huggingface_hub from drawing bars where nobody wants to see any. It must not be imported yet."""
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def end_like_ctrl_c() -> None:
    """Have SIGTERM end the command as Ctrl-C does: in one line, and so that it can be continued."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
