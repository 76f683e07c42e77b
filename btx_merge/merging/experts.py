"""The feed-forward blocks of the sources as experts: copied, cut into chunks, with their own norms folded in.

Legend: S sources, R rows of a block, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import einops
import numpy as np

from btx_merge.architectures.llama import FF_NORM
from btx_merge.checkpoints.dtypes import Float32, from_float32, to_float32
from btx_merge.checkpoints.layout import BLOCK_BYTES, Block, portions
from btx_merge.merging.combine import cast, combining_rule
from btx_merge.merging.plan import EXPERT_LAYOUTS, ExpertColumns, ExpertRows, Plan

_SMALL_GAMMA = 1e-3
"""Part of the merged norm's mean magnitude below which a channel counts as shut. Nothing comes through it that could be
restored, and its ratio, of thousands, would make the weights leave the range of float16. A guard, not a measured
optimum: no figure of ours depends on it."""


def expert_rows(job: ExpertRows, plan: Plan, gamma: Callable[[int], Float32] | None = None) -> Iterator[Block]:
    """Read a source's rows: bytes as they are where dtype and recipe allow it, otherwise through float32.

    Args:
        gamma: returns, for a layer's number, the norm that its experts will stand behind, [H]. It is asked where norms
            are folded; by default it is the norm that the merge gives.
    """
    source, finite = plan.experts[job.source], not plan.recipe.allow_nonfinite
    copied = job.fold_layer is None and source.is_stored(job.name, job.tensor.dtype)
    ratio = None  # [H], for the columns of gate and up
    if job.fold_layer is not None:
        name = FF_NORM.format(layer=job.fold_layer)
        own = source.rows(name, 0, plan.seed.config["hidden_size"])
        ratio = norm_ratio(own, gamma(job.fold_layer) if gamma else _merged_norm(plan, name))
    for start, stop in portions(job.start, job.stop, job.nbytes // (job.stop - job.start), BLOCK_BYTES):
        if copied:
            yield 0, source.stored_rows(job.name, start, stop, finite)
            continue
        values = source.rows(job.name, start, stop, finite)
        yield 0, cast(values if ratio is None else values * ratio, job, plan)


def expert_columns(job: ExpertColumns, plan: Plan) -> Iterator[Block]:
    """Deal out the columns of the job's down projections to its experts, one block per expert and run of rows."""
    finite = not plan.recipe.allow_nonfinite
    pattern = EXPERT_LAYOUTS[plan.recipe.expert_mode].down
    for start, stop in portions(job.start, job.stop, job.nbytes // (job.stop - job.start), BLOCK_BYTES):
        # [S, R, I]; a row of down is an output, so its columns are the neurons that the chunks are made of
        rows = np.stack([plan.experts[index].rows(job.name, start, stop, finite) for index in job.sources])
        for expert, block in enumerate(einops.rearrange(rows, pattern, c=plan.chunks)):
            yield expert, cast(block, job, plan)


def norm_ratio(own: Float32, merged: Float32) -> Float32:
    """Compute gamma_source / gamma_merged of the norm before the feed-forward block, [H].

    W diag(gamma_i / gamma_merged) behind the merged norm sees what W saw behind its own. Where the merged gamma is
    next to nothing the ratio stays 1.

    >>> norm_ratio(np.array([2, 3, 5], np.float32), np.array([4, 1, 1e-9], np.float32)).tolist()
    [0.5, 3.0, 1.0]
    """
    shut = np.abs(merged) < _SMALL_GAMMA * np.abs(merged).mean()
    return np.where(shut, np.float32(1), own / np.where(shut, np.float32(1), merged))


def _merged_norm(plan: Plan, name: str) -> Float32:
    """Compute a norm of the merge as it will be stored, rounding included: that is what the experts stand behind."""
    values = combining_rule(plan, name)(0, plan.seed.config["hidden_size"])
    return to_float32(from_float32(values, plan.dtype), plan.dtype)
