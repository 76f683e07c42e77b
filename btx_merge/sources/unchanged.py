"""Groups of weights in which a source is the seed, to the byte: averaging them with the seed's loses nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from btx_merge.architectures.llama import expected_tensors
from btx_merge.checkpoints.layout import BLOCK_BYTES, portions
from btx_merge.sources.divergence import FEED_FORWARD, Divergence, group_of
from btx_merge.sources.source import Source


def unchanged_groups(sources: Sequence[Source], measured: Iterable[Divergence]) -> dict[str, tuple[str, ...]]:
    """Return for each source but the seed, the first, the groups of weights that are the seed's own bytes.

    Only groups in which no sampled value differs are read, block by block up to the first byte that does; the seed's
    block is read once for all sources.

    Args:
        measured: what `measure_divergence` found in the same sources.
    """
    seed = sources[0]
    left: dict[str, list[str]] = {source.name: [] for source in sources[1:]}
    for item in measured:
        if item.distance == 0:
            left[item.source].append(item.group)
    for name in expected_tensors(seed.config):
        group = group_of(name)
        others = [source for source in sources[1:] if group in left[source.name]]
        for source in _differing(seed, others, name):
            left[source.name].remove(group)
    return {name: tuple(groups) for name, groups in left.items()}


def is_lossless(sources: Iterable[Source], unchanged: Mapping[str, Sequence[str]]) -> bool:
    """Return whether all sources have the seed's own bytes in everything that a merge makes one of.

    Args:
        sources: all but the seed.
    """
    for source in sources:
        shared = {group_of(name) for name in expected_tensors(source.config)} - {FEED_FORWARD}
        if not shared <= set(unchanged[source.name]):
            return False
    return True


def _differing(seed: Source, others: Sequence[Source], name: str) -> list[Source]:
    """Return the sources in which a tensor is not the seed's, to the byte."""
    tensor = seed.tensors[seed.stored_name(name)]
    differing, same = [], []
    for source in others:
        theirs = source.tensors[source.stored_name(name)]
        if not source.is_stored(name, tensor.dtype) or theirs.shape != tensor.shape:
            differing.append(source)
        elif (theirs.file, theirs.places) != (tensor.file, tensor.places):  # an adapter's is the seed's very file
            same.append(source)
    for start, stop in portions(0, tensor.shape[0], tensor.row_bytes, BLOCK_BYTES) if same else ():
        ours = tensor.read_rows(start, stop).copy()  # lent: the next read uses the same buffer
        for source in list(same):
            if not np.array_equal(ours, source.stored_rows(name, start, stop)):
                differing.append(source)
                same.remove(source)
    return differing
