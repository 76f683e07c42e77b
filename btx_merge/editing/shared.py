"""The shared weights of an edited model: kept, or moved as if merged with the new set of sources.

Where a stored value is what the merge of the old set gives, it becomes what the merge of the new set gives: a model
that was only merged ends with the bytes of a fresh merge. A value that a finetuning or a fit has moved moves on by the
difference of the two merges, in float32, rounded once.

Legend: R rows of a block, W the shape of a row, V tokens of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from btx_merge.architectures.llama import EMBEDDING, HEAD
from btx_merge.checkpoints.dtypes import STORED, Float32, Raw, all_finite, from_float32, to_float32
from btx_merge.checkpoints.layout import BLOCK_BYTES, Block, Job, OutputTensor, portions
from btx_merge.editing.plan import EditPlan
from btx_merge.errors import NonFiniteError
from btx_merge.merging.combine import DIFFERENCE_BLOCK_BYTES, Rule, cast, combining_rule, owners_mean
from btx_merge.merging.mixture import Mixture
from btx_merge.merging.plan import Plan
from btx_merge.merging.recipe import DIFFERENCE_METHODS
from btx_merge.sources.segments import Segment, runs, within
from btx_merge.sources.vocabulary import token_ids


def move(raw: Raw, dtype: str, old: Float32, new: Float32) -> Raw:
    """Move stored values, flat bytes, from one merge's values to another's.

    A value that is what the old merge gives becomes what the new one gives; any other moves by their difference.

    >>> stored = np.array([1.0, 5.0], np.float32).view(np.uint8)
    >>> moved = move(stored, "F32", old=np.array([1, 4], np.float32), new=np.array([2, 3], np.float32))
    >>> moved.view(np.float32).tolist()
    [2.0, 4.0]
    """
    merged = from_float32(old, dtype).view(STORED[dtype]) == raw.view(STORED[dtype])
    with np.errstate(over="ignore"):
        moved = to_float32(raw, dtype) + (new.reshape(-1) - old.reshape(-1))
    moved[merged] = new.reshape(-1)[merged]
    return from_float32(moved, dtype)


@dataclass(frozen=True, eq=False)
class SharedUpdate:
    """The merges of the old and of the new set of sources, from the sources themselves."""

    before: Plan
    """The merge of the old set."""
    after: Plan
    """The merge of the new set."""
    rows_before: tuple[Segment, ...]
    """Which rows of the old merge's embedding the result's are, token by token."""
    rows_after: tuple[Segment, ...]
    """Which rows of the new merge's embedding they are."""

    @classmethod
    def of(cls, result: Mixture, before: Plan, after: Plan) -> SharedUpdate:
        """Prepare the update of a result between two merges."""
        return cls(before, after, runs(_same_rows(result, before)), runs(_same_rows(result, after)))

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, as a merge has them: what DARE drops depends on it."""
        return DIFFERENCE_BLOCK_BYTES if self.after.recipe.combine in DIFFERENCE_METHODS else BLOCK_BYTES


@dataclass(frozen=True, eq=False)
class _Merges:
    """One shared tensor of both merges, at the result's rows."""

    old: Rule
    """What computes its rows of the old set."""
    new: Rule
    """What computes its rows of the new set."""
    old_rows: tuple[Segment, ...] | None
    """Which rows of the old merge the result's are; None: the same."""
    new_rows: tuple[Segment, ...] | None
    """Which rows of the new merge they are; None: the same."""

    def move(self, tensor: OutputTensor, raw: Raw, start: int, stop: int) -> Raw:
        """Return stored rows [start, stop) moved to the new set's merge; rows that one of the two lacks stay."""
        old, has_old = _rows_at(self.old, self.old_rows, tensor, start, stop)
        new, has_new = _rows_at(self.new, self.new_rows, tensor, start, stop)
        moved = move(raw, tensor.dtype, old, new).reshape(stop - start, -1)
        lacking = ~(has_old & has_new)
        moved[lacking] = raw.reshape(stop - start, -1)[lacking]
        return moved.reshape(-1)


@dataclass(frozen=True, eq=False)
class SharedWeights:
    """What fills the shared tensors of an edit."""

    edit: EditPlan
    """The edit."""
    update: SharedUpdate | None
    """None: they are kept."""

    def rows(self, job: Job) -> Iterator[Block]:
        """Compute a job's rows, block by block."""
        merges = self._merges(job.tensor.name)
        for start, stop in self._blocks(job.tensor, job.start, job.stop):
            yield 0, self._block(job, merges, start, stop)

    def stored_norm(self, name: str) -> Float32:
        """Return a norm of the model, [H], for experts that absorb their own. Such a model's norms are kept."""
        stored = self.edit.model.tensors[name]
        return to_float32(stored.read_rows(0, stored.shape[0]), stored.dtype)

    def _merges(self, name: str) -> _Merges | None:
        """Return both merges of a shared tensor; None where the weights are kept."""
        if self.update is None:
            return None
        old, new = combining_rule(self.update.before, name), combining_rule(self.update.after, name)
        if name in (EMBEDDING, HEAD):
            return _Merges(old, new, self.update.rows_before, self.update.rows_after)
        return _Merges(old, new, None, None)

    def _blocks(self, tensor: OutputTensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut rows [start, stop) of a tensor into blocks."""
        return portions(start, stop, tensor.row_bytes, self.update.block_bytes if self.update else BLOCK_BYTES)

    def _block(self, job: Job, merges: _Merges | None, start: int, stop: int) -> Raw:
        """Compute rows [start, stop) of a job's tensor as flat bytes: kept ones moved, new tokens' from new experts.

        Raises:
            NonFiniteError: a moved value is not finite, and that is not allowed.
        """
        tensor, stored = job.tensor, self.edit.model.tensors[job.tensor.name]
        out: Raw = np.zeros((stop - start) * tensor.row_bytes, np.uint8)
        rows = out.reshape(stop - start, -1)  # a view: what is written there is in `out`
        is_new = np.ones(stop - start, bool)
        for part in within(self._kept_rows(tensor.name), start, stop):
            here = slice(part.out - start, part.out - start + part.count)
            rows[here] = stored.read_rows(part.row, part.row + part.count).reshape(part.count, -1)
            is_new[here] = False
        if merges:
            out = merges.move(tensor, out, start, stop)
            rows = out.reshape(stop - start, -1)
        if is_new.any():  # tokens that a new expert brings: the mean over those who have them
            values = owners_mean(self.edit.mixture, tensor.name, [], start, stop)[0]
            rows[is_new] = cast(values, job, self.edit.mixture).reshape(stop - start, -1)[is_new]
        if merges and not self.edit.mixture.allow_nonfinite and not all_finite(out, tensor.dtype):
            raise NonFiniteError(
                f"{tensor.name}: a value leaves the range of {tensor.dtype}, or the model holds NaN or Inf. "
                "Give --shared keep; --allow-nonfinite goes on all the same."
            )
        return out

    def _kept_rows(self, name: str) -> tuple[Segment, ...]:
        """Return which rows of the result the model has; the others are tokens that a new expert brings."""
        kept = next(source for source in self.edit.mixture.sources if self.edit.is_kept(source))
        return self.edit.mixture.source_layout(name)[kept.name]


def _rows_at(
    rule: Rule, segments: tuple[Segment, ...] | None, tensor: OutputTensor, start: int, stop: int
) -> tuple[Float32, NDArray[np.bool_]]:
    """Compute rows of a merge at the places where the result has them, [R, *W], and tell which it has, [R].

    Args:
        segments: which rows of the merge the result's are; None: the same.
    """
    if segments is None:
        return rule(start, stop), np.ones(stop - start, bool)
    values, has = np.zeros((stop - start, *tensor.shape[1:]), np.float32), np.zeros(stop - start, bool)
    for part in within(segments, start, stop):
        here = slice(part.out - start, part.out - start + part.count)
        values[here], has[here] = rule(part.row, part.row + part.count), True
    return values, has


def _same_rows(result: Mixture, other: Mixture) -> NDArray[Any]:
    """Find, for every row of the result, the other one's row of the same token, or of the same padding; -1 for none.

    Returns:
        [V] of the result, as `runs` takes it.
    """
    size = other.vocabulary.size
    rows = np.full(result.vocabulary.size, -1)
    ours, theirs = (token_ids(plan.vocabulary, plan.sources) for plan in (result, other))
    if ours is None or theirs is None:
        shared = min(size, len(rows))
        rows[:shared] = np.arange(shared)
        return rows
    # a row that is padding in both is the same padding; one that is a token in either is matched by its string alone
    padding = np.setdiff1d(np.arange(min(size, len(rows))), [*ours.values(), *theirs.values()])
    rows[padding] = padding
    for token, row in ours.items():
        if token in theirs:
            rows[row] = theirs[token]
    return rows
