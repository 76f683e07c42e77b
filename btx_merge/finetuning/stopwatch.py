"""How the wall time of a run divides among its parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

PARTS = ("start", "loading", "evaluations", "teachers", "steps", "checkpoints", "writing")


class Stopwatch:
    """Books every second on the part that is running: on `start` until another begins.

    A part inside another one, such as an evaluation between steps, stops the clock of the outer one.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._running = ["start"]
        self._since = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Book what happens inside on a part of `PARTS`."""
        self.book()
        self._running.append(name)
        try:
            yield
        finally:
            self.book()
            self._running.pop()

    def book(self) -> dict[str, float]:
        """Return the seconds of each part until now; together they are all that have passed."""
        now = time.perf_counter()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now
        return dict(self.seconds)
