"""The score of Branch-Train-Merge: the losses of the mixture, by those that each expert has alone.

Legend: T scored tokens of a window, B blocks of them, E experts, K numbers of experts that run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from btx_merge.evaluation.report import Score
from btx_merge.evaluation.scoring import Losses
from btx_merge.measuring.losses import perplexity
from btx_merge.measuring.windows import Domain, Window

if TYPE_CHECKING:
    from btx_merge.evaluation.btm import BranchTrainMerge

BLOCK = 32
"""Tokens for which experts are chosen together, by what the models read before them."""


def ensemble_scores(
    ensemble: BranchTrainMerge, domain: Domain, losses: Mapping[str, Losses], top_ks: Sequence[int]
) -> list[Score]:
    """Measure an ensemble on a domain, once for each number of experts that run for a context.

    At the beginning of a document nothing has been read, and all experts run alike.

    Args:
        losses: of each expert, on this domain.
    """
    total: NDArray[np.float64] = np.zeros(len(top_ks))
    tiny = np.finfo(np.float64).tiny  # of a token that no expert thinks possible
    for window in domain.windows(ensemble.tokenizer, True):
        alone = np.stack([losses[name][window.place] for name in ensemble.experts], axis=1)  # [T, E]
        likelihood = np.exp(-alone.astype(np.float64))
        # the mean of distributions, at the token that is there: sum over e of w_e p_e(token)
        shares = np.repeat(_shares(ensemble, window, top_ks), BLOCK, axis=1)[:, : window.scored]  # [K, T, E]
        total -= np.log(np.maximum((shares * likelihood).sum(axis=2), tiny)).sum(axis=1)
    amount = domain.amount
    return [
        Score(loss / math.log(2) / amount.nbytes, perplexity(loss / amount.tokens), amount.tokens)
        for loss in total.tolist()
    ]


def _shares(ensemble: BranchTrainMerge, window: Window, top_ks: Sequence[int]) -> NDArray[np.float64]:
    """Return each expert's share in each block, [K, B, E]."""
    names, first = list(ensemble.experts), len(window.ids) - window.scored
    starts = range(0, window.scored, BLOCK)
    out: NDArray[np.float64] = np.zeros((len(top_ks), len(starts), len(names)))
    for block, start in enumerate(starts):
        context = ensemble.tokenizer.decode(window.ids[: first + start], skip_special_tokens=True)
        cosines = ensemble.cosines(context)
        for row, top_k in enumerate(top_ks):
            for name, share in ensemble.weights_by(cosines, top_k).items():
                out[row, block, names.index(name)] = share
    return out
