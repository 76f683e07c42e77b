"""A head of its own for a fitted merge: least squares, each row weighed by how often each domain has its token.

The row of a token that one domain alone has is free to serve that domain. Of row v,

    w_v = argmin_w  sum_i p_iv mean_n (w . y_n - h_iv . x_n)^2  +  lambda mu_v |w - m_v|^2

with x_n and y_n what stands behind the last norm of source i and of the merged model, for the N tokens of domain i,
h_iv the source's row, m_v the mean of all sources' rows, p_iv the domain's share in the token, and mu_v the mean
square of the inputs. With G_i = sum y_n y_n^T / N and C_i = sum y_n x_n^T / N,

    w_v = (sum_i p_iv G_i + lambda mu_v)^-1 (sum_i p_iv C_i h_iv + lambda mu_v m_v)

Each row has a matrix of its own to be solved. Rows whose shares are nearly alike are put into one bin, whose matrix is
factorised once.

Legend: V vocabulary, D domains, H hidden, R rows that are solved together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from btx_merge.architectures.llama import HEAD
from btx_merge.fitting.checkpoint import Checkpoint
from btx_merge.fitting.dense_source import DenseSource
from btx_merge.fitting.equations import Moments

BINS = 64
"""Vectors of shares that rows are rounded to, at most."""
_UNSEEN = 0.1
"""Tokens that each domain is taken to have in addition, spread evenly over the vocabulary. A row that no text has is
then fitted to all domains alike."""
_ROWS = 4096
"""Rows that are solved together, at most; it bounds the memory."""
_ROUNDS = 20
"""Rounds of moving the bins' middles (Lloyd's algorithm)."""


def fit_head_by_frequency(
    checkpoint: Checkpoint,
    sources: Mapping[str, DenseSource],
    counts: Mapping[str, torch.Tensor],
    moments: Moments,
    ridge: float,
) -> None:
    """Solve for every row of the checkpoint's head and write it.

    Args:
        sources: what is fitted to, by domain.
        counts: of every token in each domain's text, [V], on a scale that domains share.
        moments: by domain, `gram.NAME` (G_i) and `cross.NAME` (C_i), [H, H].
        ridge: lambda.

    Raises:
        NonFiniteError: a solution that the checkpoint's dtype cannot hold.
    """
    names, device = list(counts), checkpoint.device
    grams = [moments[f"gram.{name}"].to(device) for name in names]
    crosses = [moments[f"cross.{name}"].to(device) for name in names]
    bins, middles = share_bins(torch.stack([counts[name].double().cpu() for name in names], dim=1))
    for number, middle in enumerate(middles):
        gram = torch.zeros_like(grams[0])
        for share, own_gram in zip(middle.tolist(), grams, strict=True):
            gram.add_(own_gram, alpha=share)
        penalty = ridge * gram.diagonal().mean()
        gram.diagonal().add_(penalty)
        factor = torch.linalg.cholesky(gram)
        for rows in torch.split((bins == number).nonzero()[:, 0], _ROWS):
            mean = checkpoint.gather(HEAD, rows)
            target = penalty * mean.double()  # [R, H]
            for name, share, cross in zip(names, middle.tolist(), crosses, strict=True):
                own = sources[name].gather(HEAD, rows, mean)
                target += share * (own.double() @ cross.T)
            solved = torch.cholesky_solve(target.T, factor).T
            checkpoint.scatter(HEAD, solved, rows)


def share_bins(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each token's shares in the domains to one of at most `BINS` vectors; exactly where that many are enough.

    The bins' first middles are rows as far from each other as can be, which bounds what the rounding moves; then each
    becomes the mean of its rows, weighed by frequency.

    Args:
        counts: [V, D]

    Returns:
        Every row's bin, [V], and the bins' shares, [BINS or fewer, D] in float64.
    """
    smooth = counts + _UNSEEN * counts.sum(dim=0) / len(counts)
    frequency = smooth.sum(dim=1)
    shares = smooth / frequency[:, None]
    middles = shares[:1]
    distance = (shares - middles).square().sum(dim=1)
    while len(middles) < BINS and distance.max() > 0:
        middles = torch.cat([middles, shares[distance.argmax()][None]])
        distance = distance.minimum((shares - middles[-1]).square().sum(dim=1))
    if distance.max() == 0:
        return _nearest(shares, middles), middles
    for _ in range(_ROUNDS):
        bins = _nearest(shares, middles)
        weight = torch.zeros(len(middles), dtype=shares.dtype).index_add(0, bins, frequency)
        total = torch.zeros_like(middles).index_add(0, bins, smooth)
        middles = torch.where(weight[:, None] > 0, total / weight[:, None].clamp(min=1e-300), middles)
    return _nearest(shares, middles), middles


def _nearest(shares: torch.Tensor, middles: torch.Tensor) -> torch.Tensor:
    return torch.cdist(shares, middles, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
