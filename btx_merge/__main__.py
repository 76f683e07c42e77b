"""The command `btx`. `python -m btx_merge` is the same, so accelerate and torchrun can start it as a module."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command. Ctrl-C while its modules are still imported ends it in one line, too."""
    try:
        from btx_merge.cli import main as run

        run()
    except KeyboardInterrupt:  # before anything was written
        print("error: Interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
