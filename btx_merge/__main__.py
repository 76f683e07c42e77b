"""The command `btx`. `python -m btx_merge` is the same, so accelerate and torchrun can start it as a module.

Ctrl-C ends it in one line from here on: importing what the command needs takes a second, and nothing is written yet.
"""

from __future__ import annotations

import os
import signal
import sys

_INTERRUPTED = "error: Interrupted."


def _end(number: int, frame: object) -> None:
    """End the process at once: an exception out of a half-imported module may be caught there, or become another."""
    os.write(2, f"{_INTERRUPTED}\n".encode())
    os._exit(130)


_IS_OURS = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not so under nohup, nor in another thread
if _IS_OURS:
    signal.signal(signal.SIGINT, _end)


def main() -> None:
    """Run the command."""
    from btx_merge.cli.app import main as run

    try:
        if _IS_OURS:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:  # before a command began, or when it was done
        print(_INTERRUPTED, file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
