"""A reordering of rows as runs that can be copied."""

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
    source: int
    count: int


def runs(source_row: NDArray[np.integer[Any]]) -> tuple[Segment, ...]:
    """The mapping from a result's row to a source's (-1: none), as runs in which both grow by one."""
    owned = np.flatnonzero(source_row >= 0)
    if not owned.size:
        return ()
    breaks = np.flatnonzero((np.diff(owned) != 1) | (np.diff(source_row[owned]) != 1)) + 1
    return tuple(Segment(int(run[0]), int(source_row[run[0]]), len(run)) for run in np.split(owned, breaks))


def within(segments: Sequence[Segment], start: int, stop: int) -> Iterator[Segment]:
    """The parts of the segments that lie in the result's rows [start, stop)."""
    for segment in segments:
        first, last = max(start, segment.out), min(stop, segment.out + segment.count)
        if first < last:
            yield Segment(first, segment.source + first - segment.out, last - first)
