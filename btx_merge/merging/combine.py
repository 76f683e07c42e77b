"""How everything that is no feed-forward block becomes one: attention, embeddings, norms and head.

BTX takes the plain mean over all sources (arXiv 2403.07816, section 3.2). The other rules are options: TIES
(arXiv 2306.01708) and DARE (arXiv 2311.03099) work on the differences from the seed, through peft. All of them
accumulate in float32, round once, and need memory for a block of rows only.
"""

from __future__ import annotations

import threading
import warnings
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from btx_merge.checkpoints.dtypes import Float32, Raw, all_finite, from_float32
from btx_merge.checkpoints.layout import BLOCK_BYTES, Block, Job, portions
from btx_merge.errors import NonFiniteError
from btx_merge.merging.mixture import Mixture, SharedRows
from btx_merge.merging.plan import Plan
from btx_merge.merging.recipe import DIFFERENCE_METHODS
from btx_merge.sources.segments import within
from btx_merge.sources.source import Source

DIFFERENCE_BLOCK_BYTES = 1 << 21
"""Larger, for each block is a call of torch."""
_torch_lock = threading.Lock()  # peft's functions draw from torch's one generator and may warn

Rule = Callable[[int, int], Float32]
"""Rows [start, stop) of a combined tensor in float32, before the cast."""


def cast(values: Float32, job: Job, mixture: Mixture) -> Raw:
    """Values as the bytes of the output's dtype: the one rounding of a merge.

    Raises:
        NonFiniteError: a value is outside of the dtype's range, and that is not allowed.
    """
    dtype = job.tensor.dtype
    raw = from_float32(values, dtype)
    if not mixture.allow_nonfinite and not all_finite(raw, dtype):
        raise NonFiniteError(
            f"{job.tensor.name}: a value leaves the range of {dtype}. "
            "Choose a wider --dtype; --allow-nonfinite goes on all the same."
        )
    return raw


def shared_rows(job: SharedRows, plan: Plan) -> Iterator[Block]:
    """Rows of a combined tensor."""
    rule = combining_rule(plan, job.tensor.name)
    block = DIFFERENCE_BLOCK_BYTES if plan.recipe.combine in DIFFERENCE_METHODS else BLOCK_BYTES
    for start, stop in portions(job.start, job.stop, job.tensor.row_bytes, block):
        yield 0, cast(rule(start, stop), job, plan)


def combining_rule(plan: Plan, name: str) -> Rule:
    """What computes the rows of one shared tensor by the recipe."""
    if plan.recipe.combine in DIFFERENCE_METHODS:
        return _difference_rule(plan, name)
    return lambda start, stop: _mean_rows(plan, name, start, stop)


def _mean_rows(plan: Plan, name: str, start: int, stop: int) -> Float32:
    combine = plan.recipe.combine
    if combine == "seed":
        return _base_rows(plan, name, start, stop)[0]
    shares = [(source, source.weight if combine == "weighted" else 1.0) for source in plan.experts]
    return owners_mean(plan, name, shares, start, stop)[0]


def _base_rows(plan: Plan, name: str, start: int, stop: int) -> tuple[Float32, NDArray[np.bool_]]:
    """The seed's rows, and which it owns; the others are the mean of their owners, from whom nothing differs."""
    return owners_mean(plan, name, [(plan.seed, 1.0)], start, stop)


def owners_mean(
    mixture: Mixture, name: str, shares: list[tuple[Source, float]], start: int, stop: int
) -> tuple[Float32, NDArray[np.bool_]]:
    """The weighted mean of the rows over their owners, and which rows have one among the shares.

    Rows of tokens that only others own are the plain mean of those.
    """
    total, weight = _weighted_sum(mixture, name, shares, start, stop)
    owned = weight > 0
    if not owned.all():
        others, count = _weighted_sum(mixture, name, [(source, 1.0) for source in mixture.sources], start, stop)
        total[~owned], weight[~owned] = others[~owned], count[~owned]
    total /= weight.reshape(-1, *[1] * (total.ndim - 1))
    return total, owned


def _weighted_sum(
    mixture: Mixture, name: str, shares: list[tuple[Source, float]], start: int, stop: int
) -> tuple[Float32, Float32]:
    """Sum of weight times row over the sources that own the row, and the sum of their weights per row."""
    layout, seed = mixture.source_layout(name), mixture.seed
    finite = not mixture.allow_nonfinite
    total = np.zeros((stop - start, *seed.tensors[seed.stored_name(name)].shape[1:]), np.float32)
    weights = np.zeros(stop - start, np.float32)
    for source, weight in shares:
        for segment in within(layout[source.name], start, stop):
            out = slice(segment.out - start, segment.out - start + segment.count)
            rows = source.rows(name, segment.row, segment.row + segment.count, finite)
            total[out] += rows if weight == 1 else np.float32(weight) * rows
            weights[out] += np.float32(weight)
    return total, weights


def _difference_rule(plan: Plan, name: str) -> Rule:
    """The seed plus the combined differences of the experts from it, through peft.

    The weights are relative: TIES averages over the sources that agree in sign, so they are scaled to a mean of 1
    there; dare_linear adds, so they are scaled to a sum of 1, the seed's (whose difference is 0) included.
    """
    import torch
    from peft.utils import merge_utils

    recipe = plan.recipe
    others = [source for source in plan.experts if source is not plan.seed]
    weights = torch.tensor([float(source.weight) for source in others])
    if not weights.any():
        return lambda start, stop: _base_rows(plan, name, start, stop)[0]
    if recipe.combine == "dare_linear":
        weights /= weights.sum() + (recipe.seed_weight if recipe.seed_expert else 0)
    else:
        weights /= weights.mean()
    smallest = _smallest_kept(plan, name, others) if recipe.combine == "ties" else []

    def rule(start: int, stop: int) -> Float32:
        base, differences = _differences(plan, name, others, start, stop)
        for difference, least in zip(differences, smallest, strict=False):
            difference[_magnitude_bits(difference) < least] = 0
        tasks = [torch.from_numpy(difference) for difference in differences]
        with _torch_lock, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The density 1")  # peft's; here it is meant
            torch.manual_seed(zlib.crc32(f"{recipe.random_seed} {name} {start}".encode()))
            if recipe.combine == "ties":
                merged = merge_utils.ties(tasks, weights, density=1.0)  # trimmed above, over the whole tensor
            elif recipe.combine == "dare_ties":
                merged = merge_utils.dare_ties(tasks, weights, recipe.density)
            else:
                merged = merge_utils.dare_linear(tasks, weights, recipe.density)
        base += recipe.scale * merged.numpy()
        return base

    return rule


def _differences(plan: Plan, name: str, others: list[Source], start: int, stop: int) -> tuple[Float32, list[Float32]]:
    """The base's rows and, per source, its difference from them; 0 in rows that one of the two lacks."""
    base, seed_owns = _base_rows(plan, name, start, stop)
    differences = []
    for source in others:
        values, weight = _weighted_sum(plan, name, [(source, 1.0)], start, stop)
        values -= base
        values[(weight == 0) | ~seed_owns] = 0
        differences.append(values)
    return base, differences


def _smallest_kept(plan: Plan, name: str, others: list[Source]) -> list[int]:
    """Per source, the bits of the smallest magnitude that TIES keeps of its differences in a whole tensor.

    The `density * size`-th largest, found by counting: first by the upper half of the bits (magnitudes order as
    their bits do), then by the lower half within the bin that holds it. What equals it is kept as well.
    """
    rows = plan.rows_of(name)
    row_size = plan.seed.tensors[plan.seed.stored_name(name)].row_bytes
    kept = int(plan.recipe.density * rows * _row_values(plan, name))
    if kept == 0:
        return [1 << 32] * len(others)
    upper = [0] * len(others)
    rank = [kept] * len(others)
    for half in ("upper", "lower"):
        counts = np.zeros((len(others), 1 << 16), np.int64)
        for start, stop in portions(0, rows, row_size, DIFFERENCE_BLOCK_BYTES):
            for index, difference in enumerate(_differences(plan, name, others, start, stop)[1]):
                bits = _magnitude_bits(difference)
                chosen = bits >> 16 if half == "upper" else bits[bits >> 16 == upper[index]] & 0xFFFF
                counts[index] += np.bincount(chosen.reshape(-1), minlength=1 << 16)
        for index, count in enumerate(counts):
            from_top = count[::-1].cumsum()
            place = int(np.searchsorted(from_top, rank[index]))
            rank[index] -= int(from_top[place - 1]) if place else 0
            upper[index] = (upper[index] << 16 if half == "lower" else 0) + (1 << 16) - 1 - place
    return upper


def _row_values(plan: Plan, name: str) -> int:
    shape = plan.seed.tensors[plan.seed.stored_name(name)].shape
    return shape[1] if len(shape) > 1 else 1


def _magnitude_bits(values: Float32) -> NDArray[np.uint32]:
    """|values| as integers of the same order."""
    return values.view(np.uint32) & np.uint32(0x7FFFFFFF)
