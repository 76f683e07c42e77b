"""Marks of its domain in every token's hidden state, by which later routers know it. They cost nothing at inference.

A token alone says little about its domain, its context nearly all. Attention gathers the context, so its output
projection is fitted to write down what it finds: in each layer its target is the source's state and, besides,

    c s (u_i - u)

with u_i a direction for domain i, u the mean of all domains' directions, and s the root of the mean |h|^2 over the
merged states in front of the layer. Directions are the eigenvectors with the smallest eigenvalues of `sum h h^T`, over
the sources' states behind their first attention: the sources write next to nothing there, and read next to nothing.

Legend: B windows, T tokens in each, N tokens, H hidden, D domains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from btx_merge.fitting.streams import TokenStream


class Evidence:
    """Sets the marks of domains, layer by layer."""

    def __init__(self, texts: Sequence[TokenStream], size: float, device: torch.device):
        """Prepare; no states are there yet.

        Args:
            size: c.
        """
        self.texts, self.size, self.device = texts, size, device
        self.directions: torch.Tensor | None = None

    def set_marks(self) -> None:
        """Set each stream's mark for a layer: the sources' states are behind its attention, the merged before it."""
        if self.directions is None:
            self.directions = self._directions()
        shares = sum(stream.share for stream in self.texts)
        square = sum(self._square(stream) for stream in self.texts) / shares
        for stream, direction in zip(self.texts, self.directions, strict=True):
            stream.mark = self.size * square**0.5 * direction

    def _directions(self) -> torch.Tensor:
        """Return u_i - u, [D, H]."""
        gram = torch.zeros((), dtype=torch.float64, device=self.device)
        for stream in self.texts:
            for batch in stream.batches(stream.fitted):
                rows = stream.dense[batch].flatten(0, 1)  # [N, H]
                gram = gram + (rows.T @ rows).double() * stream.per_token
        _, vectors = torch.linalg.eigh(gram)  # columns, by ascending eigenvalue
        chosen = vectors[:, : len(self.texts)].T.float()
        return torch.as_tensor(chosen - chosen.mean(dim=0))

    def _square(self, stream: TokenStream) -> float:
        """Return the sum of |h|^2 over a stream's merged states, each token with its weight."""
        batches = stream.batches(stream.fitted)
        total = sum(stream.merged[batch].square().sum().item() for batch in batches)
        return total * stream.per_token
