"""The command `btx`. `python -m btx_merge` is the same, so accelerate and torchrun can start it as a module."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command. Ctrl-C while its modules are still imported ends it in one line, too."""
    try:
        from btx_merge.cli import main as run

        run()
    except KeyboardInterrupt:  # before anything was written
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of several ranks, the first speaks
            print("error: Interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
