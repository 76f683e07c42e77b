"""The score of Branch-Train-Merge: each expert on the windows for which it is chosen, then the mixture's losses.

Legend: T scored tokens of a window, B blocks of them, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from btx_merge.evaluation.report import Score
from btx_merge.evaluation.scoring import Domain, perplexity
from btx_merge.measuring.losses import token_losses
from btx_merge.measuring.windows import Window

if TYPE_CHECKING:
    from btx_merge.evaluation.btm import BranchTrainMerge

BLOCK = 32
"""Tokens for which experts are chosen together, by what the models read before them."""


def ensemble_score(
    ensemble: BranchTrainMerge, domain: Domain, batch_tokens: int, told: Callable[[int], None]
) -> Score:
    """Measure an ensemble on a domain. One expert is in memory at a time.

    Kept in memory are 8 bytes a token, the mixture's likelihood, and 8 bytes a block and expert.

    At the beginning of a document nothing has been read, and all experts run alike.
    """
    names = list(ensemble.experts)
    shares = {_key(window): _shares(ensemble, window) for window in domain.windows(ensemble.tokenizer, True)}
    likelihood: dict[tuple[int, int], NDArray[np.float64]] = {}  # [T] of each window
    for number, name in enumerate(names):
        model = ensemble.expert(name)
        chosen = _chosen(domain.windows(ensemble.tokenizer, True), shares, number, told)
        for window, losses in token_losses(model, chosen, batch_tokens):
            # the mean of distributions, at the token that is there: sum over e of w_e p_e(token)
            share = np.repeat(shares[_key(window)][:, number], BLOCK)[: window.scored]
            mixture = likelihood.setdefault(_key(window), np.zeros(window.scored))
            mixture += share * np.exp(-losses.double().numpy())
            told(window.nbytes)
        del model
    tiny = np.finfo(np.float64).tiny  # of a token that no expert thinks possible
    loss = -sum(float(np.log(np.maximum(part, tiny)).sum()) for part in likelihood.values())
    amount = domain.amount
    return Score(loss / math.log(2) / amount.nbytes, perplexity(loss / amount.tokens), amount.tokens)


def _key(window: Window) -> tuple[int, int]:
    return window.document, window.offset


def _shares(ensemble: BranchTrainMerge, window: Window) -> NDArray[np.float64]:
    """Return each expert's share in each block, [B, E]."""
    names, first = list(ensemble.experts), len(window.ids) - window.scored
    starts = range(0, window.scored, BLOCK)
    out: NDArray[np.float64] = np.zeros((len(starts), len(names)))
    for block, start in enumerate(starts):
        context = ensemble.tokenizer.decode(window.ids[: first + start], skip_special_tokens=True)
        for name, share in ensemble.weights(context).items():
            out[block, names.index(name)] = share
    return out


def _chosen(
    windows: Iterator[Window],
    shares: dict[tuple[int, int], NDArray[np.float64]],
    number: int,
    told: Callable[[int], None],
) -> Iterator[Window]:
    """Give out the windows in which an expert has a share of some block."""
    for window in windows:
        if shares[_key(window)][:, number].any():
            yield window
        else:
            told(window.nbytes)
