"""The command `btx`. `python -m btx_merge` is the same, so accelerate and torchrun can start it as a module."""

from __future__ import annotations

from btx_merge.cli.interrupts import end_at_once

end_at_once()


def main() -> None:
    """Run the command."""
    from btx_merge.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
