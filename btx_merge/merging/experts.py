"""The feed-forward blocks of the sources as experts: copied, cut into chunks, with their own norms folded in; and
the routers that choose among them.

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
from btx_merge.merging.mixture import EXPERT_LAYOUTS, ExpertColumns, ExpertRows, Mixture
from btx_merge.merging.plan import Plan
from btx_merge.merging.recipe import MergeRecipe

_SMALL_GAMMA = 1e-3
"""Part of the merged norm's mean magnitude below which a channel counts as shut. Nothing comes through it that could
be restored, and its ratio, of thousands, would make the weights leave the range of float16. A guard, not a measured
optimum: no figure of ours depends on it."""


def expert_rows(job: ExpertRows, mixture: Mixture, merged_norm: Callable[[str], Float32]) -> Iterator[Block]:
    """Read a source's rows: bytes as they are where the dtype and the job allow it, otherwise through float32.

    Args:
        merged_norm: where norms are folded: gives the norm of this name that the experts will stand behind, [H].
    """
    source, finite = mixture.experts[job.source], not mixture.allow_nonfinite
    copied = job.fold_layer is None and source.is_stored(job.name, job.tensor.dtype)
    ratio = None  # [H], for the columns of gate and up
    if job.fold_layer is not None:
        name = FF_NORM.format(layer=job.fold_layer)
        ratio = norm_ratio(source.rows(name, 0, mixture.seed.config["hidden_size"]), merged_norm(name))
    for start, stop in portions(job.start, job.stop, job.nbytes // (job.stop - job.start), BLOCK_BYTES):
        if copied:
            yield 0, source.stored_rows(job.name, start, stop, finite)
            continue
        values = source.rows(job.name, start, stop, finite)
        yield 0, cast(values if ratio is None else values * ratio, job, mixture)


def expert_columns(job: ExpertColumns, mixture: Mixture) -> Iterator[Block]:
    """Deal out the columns of the job's down projections to its experts, one block per expert and run of rows."""
    finite = not mixture.allow_nonfinite
    pattern = EXPERT_LAYOUTS[mixture.expert_mode].down
    for start, stop in portions(job.start, job.stop, job.nbytes // (job.stop - job.start), BLOCK_BYTES):
        # [S, R, I]; a row of down is an output, so its columns are the neurons that the chunks are made of
        rows = np.stack([mixture.experts[index].rows(job.name, start, stop, finite) for index in job.sources])
        for expert, block in enumerate(einops.rearrange(rows, pattern, c=mixture.chunks)):
            yield expert, cast(block, job, mixture)


def norm_ratio(own: Float32, merged: Float32) -> Float32:
    """Compute gamma_source / gamma_merged of the norm before the feed-forward block, [H].

    W diag(gamma_i / gamma_merged) behind the merged norm sees what W saw behind its own. Where the merged gamma is
    next to nothing the ratio stays 1.

    >>> norm_ratio(np.array([2, 3, 5], np.float32), np.array([4, 1, 1e-9], np.float32)).tolist()
    [0.5, 3.0, 1.0]
    """
    shut = np.abs(merged) < _SMALL_GAMMA * np.abs(merged).mean()
    return np.where(shut, np.float32(1), own / np.where(shut, np.float32(1), merged))


def merged_norm(plan: Plan, name: str) -> Float32:
    """Compute a norm of a merge as it will be stored, [H], rounding included: experts stand behind that one."""
    values = combining_rule(plan, name)(0, plan.seed.config["hidden_size"])
    return to_float32(from_float32(values, plan.dtype), plan.dtype)


def initial_router(recipe: MergeRecipe, layer: int, num_experts: int, hidden_size: int, std: float) -> Float32:
    """Return a layer's router [E, H], stored in the checkpoint and not left to chance when it is loaded.

    random: normal(0, std). Behind an RMSNorm |x| is about sqrt(H), so std = 0.02 gives logits of about 1 for
    H = 2048; std = 1 would send every token to one expert with certainty. Otherwise zeros: all experts tie.
    RandomState's stream is frozen by numpy's policy, so that a recipe gives the same bytes in years.
    """
    shape = (num_experts, hidden_size)
    if recipe.router_init != "random":
        return np.zeros(shape, np.float32)
    values = np.random.RandomState([recipe.random_seed, layer]).standard_normal(shape)
    with np.errstate(over="ignore"):  # an overflow becomes Inf, which `cast` reports
        return (std * values).astype(np.float32)
