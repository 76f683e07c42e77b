"""The ranks that a launcher has started, as its environment variables describe them. Nothing heavy is imported.

torchrun and `accelerate launch` set WORLD_SIZE, RANK and LOCAL_RANK; launchers of MPI have names of their own. The
names, and their order, are those that accelerate reads.
"""

from __future__ import annotations

import os

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")


def started_ranks() -> tuple[str, int]:
    """Return how many ranks the environment speaks of, after the name of the variable; 1 where it speaks of none."""
    return _first(_SIZES, 1)


def own_rank() -> int:
    """Return this process's number among all ranks."""
    return _first(_RANKS, 0)[1]


def own_local_rank() -> int:
    """Return this process's number among the ranks of its host."""
    return _first(_LOCAL_RANKS, 0)[1]


def _first(names: tuple[str, ...], otherwise: int) -> tuple[str, int]:
    for name in names:
        value = os.environ.get(name, "")
        if value.isdecimal():
            return name, int(value)
    return names[0], otherwise
