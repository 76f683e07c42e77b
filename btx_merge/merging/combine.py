"""How everything that is no feed-forward block becomes one: attention, embeddings, norms and head.

BTX takes the plain mean over all sources (arXiv 2403.07816, section 3.2). The other rules are options: TIES
(arXiv 2306.01708) and DARE (arXiv 2311.03099) work on the differences from the seed, through peft. All of them
accumulate in float32, round once, and need memory for a block of rows only.

Legend: R rows of a block, W the shape of a row: (inputs,) of a matrix, () of a norm.
"""

from __future__ import annotations

import math
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
"""2 MB, eight times `BLOCK_BYTES`: each block is a few calls of torch, whose own cost shows in smaller ones. DARE
draws its random numbers block by block, so another value gives other weights for the same `random_seed`."""
_torch_lock = threading.Lock()  # peft's functions draw from torch's one generator and may warn

Rule = Callable[[int, int], Float32]
"""Rows [start, stop) of a combined tensor, [R, *W] in float32, before the cast."""


def cast(values: Float32, job: Job, mixture: Mixture) -> Raw:
    """Return values as the bytes of the output's dtype. This is the one rounding of a merge.

    Raises:
        NonFiniteError: a value is outside of the dtype's range, and that is not allowed.
    """
    dtype = job.tensor.dtype
    raw = from_float32(values, dtype)
    if not mixture.allow_nonfinite and not all_finite(raw, dtype):
        remedy = "Give a smaller --scale or weight" if dtype == "F32" else "Choose a wider --dtype in the merge"
        found = f"{job.tensor.name}: a value leaves the range of {dtype}"
        raise NonFiniteError(f"{found}. {remedy}; --allow-nonfinite goes on all the same.")
    return raw


def shared_rows(job: SharedRows, plan: Plan) -> Iterator[Block]:
    """Combine the rows of a job, block by block."""
    rule = combining_rule(plan, job.tensor.name)
    block = DIFFERENCE_BLOCK_BYTES if plan.recipe.combine in DIFFERENCE_METHODS else BLOCK_BYTES
    for start, stop in portions(job.start, job.stop, job.tensor.row_bytes, block):
        yield 0, cast(rule(start, stop), job, plan)


def combining_rule(plan: Plan, name: str) -> Rule:
    """Return what computes the rows of one shared tensor, by the recipe's `combine`."""
    if plan.recipe.combine in DIFFERENCE_METHODS:
        return _difference_rule(plan, name)
    return lambda start, stop: _mean_rows(plan, name, start, stop)


def _mean_rows(plan: Plan, name: str, start: int, stop: int) -> Float32:
    """Compute rows of the mean, plain or weighted; of `seed`, the seed's. A later fit begins from the plain mean."""
    combine = plan.recipe.combine
    if combine == "seed":
        return _base_rows(plan, name, start, stop)[0]
    shares = [(source, source.weight if combine == "weighted" else 1.0) for source in plan.experts]
    return owners_mean(plan, name, shares, start, stop)[0]


def _base_rows(plan: Plan, name: str, start: int, stop: int) -> tuple[Float32, NDArray[np.bool_]]:
    """Read the rows that differences are taken from, [R, *W], and which of them the seed owns, [R].

    Those are its own. A token that only others have gets the mean of its owners instead, and no difference.
    """
    return owners_mean(plan, name, [(plan.seed, 1.0)], start, stop)


def owners_mean(
    mixture: Mixture, name: str, shares: list[tuple[Source, float]], start: int, stop: int
) -> tuple[Float32, NDArray[np.bool_]]:
    """Compute the weighted mean of rows [start, stop), each over the sources that own it.

    Rows of tokens that nobody among the shares owns are the plain mean over all sources that do.

    Args:
        shares: sources with their weights.

    Returns:
        The rows, [R, *W], and which of them have an owner among the shares, [R].
    """
    mean, owned = _weighted_mean(mixture, name, shares, start, stop)
    if not owned.all():
        everybody = [(source, 1.0) for source in mixture.sources]
        mean[~owned] = _weighted_mean(mixture, name, everybody, start, stop)[0][~owned]
    return mean, owned


def _weighted_mean(
    mixture: Mixture, name: str, shares: list[tuple[Source, float]], start: int, stop: int
) -> tuple[Float32, NDArray[np.bool_]]:
    """Compute the mean of a row over the sources that own it, [R, *W], 0 where none does; and where one does, [R].

    A source reads only the rows that it owns: of a matrix all of them, of the embedding those of its own tokens, which
    may lie elsewhere than in the result.

    Where all owners have one value, the mean is that value, to the bit. The quotient alone would not be: in float32
    the sum of three equal numbers, divided by 3, differs from them in the last bit for one number in seven.
    """
    layout, seed = mixture.source_layout(name), mixture.seed
    finite = not mixture.allow_nonfinite
    row_shape = seed.tensors[seed.stored_name(name)].shape[1:]
    mean = np.zeros((stop - start, *row_shape), np.float32)
    first = np.zeros_like(mean)  # the value of a row's first owner
    is_one = np.ones(mean.shape, np.bool_)  # whether all others have it too
    weights = np.zeros((stop - start, *(1 for _ in row_shape)), np.float32)
    for source, weight in shares:
        for segment in within(layout[source.name], start, stop):
            begin = segment.out - start  # of the block, which begins at row `start` of the result
            out = slice(begin, begin + segment.count)
            rows = source.rows(name, segment.row, segment.row + segment.count, finite)
            mean[out] += rows if weight == 1 else np.float32(weight) * rows
            if weight > 0:
                np.copyto(first[out], rows, where=weights[out] == 0)
                is_one[out] &= rows == first[out]
            weights[out] += np.float32(weight)
    owned = weights > 0  # [R, 1, ...]
    np.divide(mean, weights, out=mean, where=owned)
    np.copyto(mean, first, where=is_one)
    return mean, owned.reshape(-1)


def _difference_rule(plan: Plan, name: str) -> Rule:
    """Return the rule that adds the combined differences of the experts to the seed, through peft.

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
        """Compute rows [start, stop). The blocks may come in any order and from any thread: each has its own seed."""
        base, differences = _differences(plan, name, others, start, stop)
        for difference, least in zip(differences, smallest, strict=False):  # `smallest` is empty but for TIES
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
        with np.errstate(over="ignore", invalid="ignore"):  # `cast` reports what comes of it
            base += recipe.scale * merged.numpy()
        return base

    return rule


def _differences(plan: Plan, name: str, others: list[Source], start: int, stop: int) -> tuple[Float32, list[Float32]]:
    """Read the base's rows and, per source, its difference from them, [R, *W]; 0 in rows that one of the two lacks."""
    base, seed_owns = _base_rows(plan, name, start, stop)
    differences = []
    for source in others:
        values, owned = _weighted_mean(plan, name, [(source, 1.0)], start, stop)
        values -= base
        values[~(owned & seed_owns)] = 0
        differences.append(values)
    return base, differences


def _smallest_kept(plan: Plan, name: str, others: list[Source]) -> list[int]:
    """Find, per source, the smallest magnitude that TIES keeps of its differences in a whole tensor, as bits.

    It is the `density * size`-th largest. A tensor may be larger than the memory, so it is not sorted but counted,
    twice: by the upper 16 bits of each magnitude (magnitudes order as their bits do), and then, among those with the
    upper half that was found, by the lower 16. What equals it is kept as well.
    """
    rows = plan.rows_of(name)
    seed_tensor = plan.seed.tensors[plan.seed.stored_name(name)]
    kept = int(plan.recipe.density * rows * math.prod(seed_tensor.shape[1:]))
    if kept == 0:
        return [1 << 32] * len(others)  # above all magnitudes
    found = [0] * len(others)  # the bits so far: the upper 16, then all 32
    rank = [kept] * len(others)  # how many of the magnitudes with those bits are kept
    for half in ("upper", "lower"):
        counts = np.zeros((len(others), 1 << 16), np.int64)
        for start, stop in portions(0, rows, seed_tensor.row_bytes, DIFFERENCE_BLOCK_BYTES):
            for index, difference in enumerate(_differences(plan, name, others, start, stop)[1]):
                bits = _magnitude_bits(difference)
                counted = bits >> 16
                if half == "lower":
                    counted = bits[counted == found[index]] & 0xFFFF
                counts[index] += np.bincount(counted.reshape(-1), minlength=1 << 16)
        for index, count in enumerate(counts):
            from_top = count[::-1].cumsum()
            place = int(np.searchsorted(from_top, rank[index]))  # the bin of the rank-th largest, from the top
            if place:
                rank[index] -= int(from_top[place - 1])  # those of larger bins are all kept
            found[index] = (found[index] << 16) + (1 << 16) - 1 - place
    return found


def _magnitude_bits(values: Float32) -> NDArray[np.uint32]:
    """Return |values| as integers that have the same order.

    >>> bits = _magnitude_bits(np.array([-2.0, 0.5, 1.0], np.float32))
    >>> [int(index) for index in bits.argsort()]
    [1, 2, 0]
    """
    return values.view(np.uint32) & np.uint32(0x7FFFFFFF)
