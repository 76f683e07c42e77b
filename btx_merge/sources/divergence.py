"""The distance of each source from the seed, estimated from a sample that is cheap enough for every merge.

Finetuning moves weights a little: the cosine to the seed stays near 1. Two models trained from different
random beginnings are orthogonal, whatever their shapes. So a source that is orthogonal did not grow from the seed.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from btx_merge.architectures.llama import expected_tensors
from btx_merge.errors import Problem
from btx_merge.sources.source import Source

RELATED_COSINE = 0.2
"""Below it in a group of matrices, a source is taken for unrelated. Independent models lie within 0.01 of 0;
even a small model trained ten times longer than its seed stays well above it."""
FEED_FORWARD = "feed-forward"
_GROUPS = {  # a part of the tensor's name to its group; the first that fits
    "norm": "norms",
    "self_attn": "attention",
    "mlp": FEED_FORWARD,
    "embed_tokens": "embeddings",
    "lm_head": "head",
}
_DECIDING = ("attention", FEED_FORWARD)
"""Groups that can tell. Norms are near 1 and embeddings share a mean, so those look alike in any two models."""
_PLACES = 3  # per tensor: its beginning, its middle, its end
_VALUES = 1024
"""At each place, at most. A cosine over the thousands of values of a group is then known to about 0.01."""

Sample = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Divergence:
    """A source against the seed, over one group of tensors."""

    source: str
    """The source's name."""
    group: str
    """attention, feed-forward, embeddings, norms or head."""
    distance: float
    """|source - seed| / |seed|; 0 for a copy of the seed."""
    cosine: float
    """Of the angle between the source's values and the seed's; 1 for a copy, about 0 for unrelated matrices."""


def group_of(name: str) -> str:
    """Return the group of weights that a tensor belongs to.

    >>> group_of("model.layers.0.mlp.up_proj.weight")
    'feed-forward'
    """
    return next(group for key, group in _GROUPS.items() if key in name)


def take_sample(source: Source, vocab_size: int) -> Sample:
    """Read a few values of every tensor by group, at the same places for every source of one shape.

    Args:
        vocab_size: that of the smallest vocabulary: at its front all have the same tokens.
    """
    parts: dict[str, list[NDArray[np.float32]]] = {}
    for name, shape in expected_tensors({**source.config, "vocab_size": vocab_size}).items():
        group = group_of(name)
        rows, width = shape[0], shape[1] if len(shape) > 1 else 1
        count = min(rows, max(1, _VALUES // width))  # whole rows, one at least: they are read in one piece
        for place in range(_PLACES):
            start = (rows - count) * place // (_PLACES - 1)
            values = source.rows(name, start, start + count).reshape(-1)[:_VALUES]
            parts.setdefault(group, []).append(values)
    return {group: np.concatenate(values) for group, values in parts.items()}


def measure_divergence(sources: Sequence[Source]) -> tuple[list[Divergence], list[Problem], list[Problem]]:
    """Measure every source against the seed (the first); find what looks unrelated, and what looks identical."""
    vocab_size = min(source.config["vocab_size"] for source in sources)
    seed = take_sample(sources[0], vocab_size)
    digests = {_digest(seed): sources[0].name}
    measured, identical = [], []
    for source in sources[1:]:
        sample = take_sample(source, vocab_size)
        for group, values in sample.items():
            if group in seed:
                measured.append(Divergence(source.name, group, *_compare(values, seed[group])))
        twin = digests.setdefault(_digest(sample), source.name)  # whoever had this sample first
        if twin != source.name:
            count = sum(values.size for values in sample.values())
            found = f"identical to {twin} in all {count:,} sampled values"
            remedy = "Two copies of one model are one expert, run twice."
            identical.append(Problem(source.name, "weights", found, "", remedy))
    return measured, list(_unrelated(measured)), identical


def _digest(sample: Sample) -> bytes:
    digest = hashlib.blake2b()
    for values in sample.values():
        digest.update(values.tobytes())
    return digest.digest()


def _compare(values: NDArray[np.float32], seed: NDArray[np.float32]) -> tuple[float, float]:
    finite = np.isfinite(values) & np.isfinite(seed)  # NaN and Inf are found and named while streaming
    a, b = (array[finite].astype(np.float64) for array in (values, seed))
    norm_a, norm_b = np.sqrt(a @ a), np.sqrt(b @ b)
    if norm_a == 0 or norm_b == 0:
        return (0.0, 1.0) if norm_a == norm_b else (1.0, 0.0)  # zeros have no direction: alike only if both are
    return float(np.linalg.norm(a - b) / norm_b), float(a @ b / (norm_a * norm_b))


def _unrelated(measured: Sequence[Divergence]) -> Iterator[Problem]:
    for source, group in itertools.groupby(measured, key=lambda item: item.source):
        items = list(group)
        if any(item.group in _DECIDING and item.cosine < RELATED_COSINE for item in items):
            figures = ", ".join(
                f"{item.group} cosine {item.cosine:.2f} distance {item.distance:.2f}" for item in items
            )
            remedy = "Use experts grown from this seed; --allow-unrelated goes on all the same."
            expected = f"cosines above {RELATED_COSINE} in {' and '.join(_DECIDING)}"
            yield Problem(source, "weights", f"not grown from the seed: {figures}", expected, remedy)
