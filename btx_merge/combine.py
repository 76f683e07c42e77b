"""How everything that is no feed-forward block becomes one: attention, embeddings, norms and head.

BTX takes the plain mean over all sources (arXiv 2403.07816, section 3.2). The other rules are options: TIES
(arXiv 2306.01708) and DARE (arXiv 2311.03099) work on the differences from the seed, through peft. All of them
accumulate in float32 and round once.
"""

from __future__ import annotations

import threading
import warnings
import zlib
from collections.abc import Iterator

import numpy as np

from btx_merge.dtypes import Float32, Raw, from_float32
from btx_merge.plan import WHOLE_TENSOR_METHODS, Plan, SharedRows
from btx_merge.segments import Segment
from btx_merge.sources import Source

Block = tuple[int, Raw]
"""Bytes for one of a job's extents (by its number), behind those that it got before."""

_BLOCK_BYTES = 1 << 18  # stays in a core's cache between being read, checked and written
_torch_lock = threading.Lock()  # peft's functions draw from torch's one generator and may warn


def portions(start: int, stop: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Rows in blocks that fit a cache."""
    size = max(1, _BLOCK_BYTES // row_bytes)
    return ((first, min(first + size, stop)) for first in range(start, stop, size))


def shared_rows(job: SharedRows, plan: Plan) -> Iterator[Block]:
    """Rows of a combined tensor."""
    if plan.recipe.combine in WHOLE_TENSOR_METHODS:
        yield 0, from_float32(merged_rows(plan, job.tensor.name, job.start, job.stop), plan.dtype)
        return
    for start, stop in portions(job.start, job.stop, job.tensor.row_bytes):
        yield 0, from_float32(merged_rows(plan, job.tensor.name, start, stop), plan.dtype)


def merged_rows(plan: Plan, name: str, start: int, stop: int) -> Float32:
    """Rows [start, stop) of a combined tensor in float32, before the cast."""
    combine = plan.recipe.combine
    if combine in WHOLE_TENSOR_METHODS:
        return _merged_differences(plan, name)[start:stop]
    shares = [(plan.seed, 1.0)]
    if combine != "seed":
        shares = [(source, source.weight if combine == "weighted" else 1.0) for source in plan.experts]
    total, weight = _weighted_sum(plan, name, shares, start, stop)
    orphans = weight == 0
    if orphans.any():  # rows of tokens that only others own: their plain mean
        others, count = _weighted_sum(plan, name, [(source, 1.0) for source in plan.sources], start, stop)
        total[orphans], weight[orphans] = others[orphans], count[orphans]
    total /= weight.reshape(-1, *[1] * (total.ndim - 1))
    return total


def _weighted_sum(
    plan: Plan, name: str, shares: list[tuple[Source, float]], start: int, stop: int
) -> tuple[Float32, Float32]:
    """Sum of weight times row over the sources that own the row, and the sum of their weights per row."""
    layout = plan.source_layout(name)
    finite = not plan.recipe.allow_nonfinite
    total = np.zeros((stop - start, *plan.seed.tensors[plan.seed.stored_name(name)].shape[1:]), np.float32)
    weights = np.zeros(stop - start, np.float32)
    for source, weight in shares:
        for segment in _within(layout[source.name], start, stop):
            out = slice(segment.out - start, segment.out - start + segment.count)
            rows = source.rows(name, segment.source, segment.source + segment.count, finite)
            total[out] += rows if weight == 1 else np.float32(weight) * rows
            weights[out] += np.float32(weight)
    return total, weights


def _within(segments: tuple[Segment, ...], start: int, stop: int) -> Iterator[Segment]:
    """The parts of the segments that lie in the result's rows [start, stop)."""
    for segment in segments:
        first, last = max(start, segment.out), min(stop, segment.out + segment.count)
        if first < last:
            yield Segment(first, segment.source + first - segment.out, last - first)


def _merged_differences(plan: Plan, name: str) -> Float32:
    """The seed plus the combined differences of the experts from it, of a whole tensor.

    The weights are relative: TIES averages over the sources that agree in sign, so they are scaled to a mean
    of 1 there; dare_linear adds, so they are scaled to a sum of 1, the seed's (whose difference is 0) included.
    """
    import torch
    from peft.utils import merge_utils

    recipe = plan.recipe
    rows = plan.rows_of(name)
    base, seed_owns = _weighted_sum(plan, name, [(plan.seed, 1.0)], 0, rows)
    others = [source for source in plan.experts if source is not plan.seed]
    if not seed_owns.all():
        total, count = _weighted_sum(plan, name, [(source, 1.0) for source in others], 0, rows)
        lacking = seed_owns == 0
        base[lacking] = total[lacking] / count[lacking].reshape(-1, *[1] * (total.ndim - 1))
    if not others:
        return base
    differences = []
    for source in others:
        values, owns = _weighted_sum(plan, name, [(source, 1.0)], 0, rows)
        values -= base
        values[(owns == 0) | (seed_owns == 0)] = 0  # a row of one side only is no difference
        differences.append(torch.from_numpy(values))
    weights = torch.tensor([source.weight for source in others])
    with _torch_lock, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density 1")  # peft's; keeping everything is allowed
        torch.manual_seed(zlib.crc32(f"{recipe.random_seed} {name}".encode()))
        if recipe.combine == "dare_linear":
            in_all = weights.sum() + (recipe.seed_weight if recipe.seed_expert else 0)
            merged = merge_utils.dare_linear(differences, weights / in_all, recipe.density)
        else:
            rule = merge_utils.ties if recipe.combine == "ties" else merge_utils.dare_ties
            merged = rule(differences, weights / weights.mean(), recipe.density)
    base += recipe.scale * merged.numpy()
    return base
