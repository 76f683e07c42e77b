"""Marks of its domain in every token's hidden state, by which later routers know it. They cost nothing at inference.

A token alone says little about its domain, its context nearly all. Attention gathers the context, so its output
projection is fitted to write down what it finds: in each layer its target is the source's state and, besides,

    c |h| (u_i - u)

with u_i a direction for domain i, u the mean of all domains' directions, and h the token's merged state in front of
the layer. Directions are the eigenvectors with the smallest eigenvalues of `sum h h^T / |h|^2`, over the sources'
states behind their first attention: the sources write next to nothing there, and read next to nothing.

Legend: B windows, T tokens in each, N tokens, H hidden, D domains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from btx_merge.fitting.equations import mean_square
from btx_merge.fitting.streams import TokenStream


def set_marks(texts: Sequence[TokenStream], size: float) -> None:
    """Set each stream's mark, for states of length 1: [H]. The sources' states are behind their first attention.

    Args:
        size: c.
    """
    gram: torch.Tensor | float = 0.0
    for stream in texts:
        for batch in stream.batches(stream.fitted):
            rows = stream.dense[batch].flatten(0, 1)  # [N, H]
            gram = gram + (rows.T @ (rows / mean_square(rows))).double() * stream.per_token
    _, vectors = torch.linalg.eigh(gram)  # columns, by ascending eigenvalue
    chosen = vectors[:, : len(texts)].T.float()
    for stream, direction in zip(texts, chosen - chosen.mean(dim=0), strict=True):
        stream.mark = size * direction
