"""Runs of rows that keep their order from a source to the result, so that each can be copied in one piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of rows that keep their order from a source to the result."""

    out: int
    """Its first row in the result."""
    row: int
    """Its first row in the source."""
    count: int


def runs(source_row: NDArray[np.integer[Any]]) -> tuple[Segment, ...]:
    """Cut the mapping from a result's row to a source's row (-1: none) into runs in which both grow by one.

    Below, rows 0 and 1 of the result are rows 4 and 5 of the source, row 2 is not in it, and rows 3 and 4 are its
    first.

    >>> runs(np.array([4, 5, -1, 0, 1]))
    (Segment(out=0, row=4, count=2), Segment(out=3, row=0, count=2))
    """
    owned = np.flatnonzero(source_row >= 0)
    if not owned.size:
        return ()
    # a run ends where rows of the result are skipped, or where the source's row does not grow with the result's
    breaks = np.flatnonzero((np.diff(owned) != 1) | (np.diff(source_row[owned]) != 1)) + 1
    return tuple(Segment(int(run[0]), int(source_row[run[0]]), len(run)) for run in np.split(owned, breaks))


def within(segments: Sequence[Segment], start: int, stop: int) -> Iterator[Segment]:
    """Cut out the parts of the segments that lie in the result's rows [start, stop).

    >>> list(within([Segment(out=0, row=4, count=5)], 2, 4))
    [Segment(out=2, row=6, count=2)]
    """
    for segment in segments:
        first, last = max(start, segment.out), min(stop, segment.out + segment.count)
        if first < last:
            yield Segment(first, segment.row + first - segment.out, last - first)
