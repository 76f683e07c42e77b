"""The text that the page shows: the first tokens of a domain, with the route, loss and weights of each.

Legend: N tokens of a window, X experts with their chunks as one, L layers.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from btx_merge.inspecting.words import words_of
from btx_merge.measuring.windows import Window

_NOT_ROUTED = 65535
"""In place of the first choice of a token that was not routed."""

Numbers = NDArray[np.float32]


class PageText:
    """The tokens of one domain that the page shows. Their number is bounded before the first of them comes."""

    def __init__(self, domain: str, most: int, layers: int, experts: int):
        """Make room.

        Args:
            most: tokens that are kept; others are passed over.
        """
        self._domain, self._most = domain, most
        self._words: list[str] = []
        self._documents: list[int] = []
        self._places: dict[tuple[int, int], int] = {}  # document and offset of a window to its first token's place
        self._gates = np.full((most, layers, experts), np.nan, np.float32)
        self._losses = np.full(most, np.nan, np.float32)
        self._alone = np.full((most, experts), np.nan, np.float32)

    def expect(self, window: Window, tokenizer: Any) -> None:
        """Take the words of a window's scored tokens while there is room. Windows come in the order of the text."""
        begin = len(self._words)
        room = self._most - begin
        if room <= 0:
            return
        self._places[window.document, window.offset] = begin
        if window.offset == 0:
            self._documents.append(begin)
        self._words += words_of(window.ids, tokenizer)[-window.scored :][:room]

    def fill(self, window: Window, gates: Numbers, losses: Numbers, alone: Numbers) -> None:
        """Take what was found about a window, in any order.

        A position is routed, and predicts the token after it: so the gates of position i are those of token i - 1. The
        first position of a document is the prefix token, which is no text.

        Args:
            gates: weights of the positions that predict the scored tokens, [N, L, X].
            losses: [N], in nats.
            alone: the losses with each expert alone, [N, X]; [N, 0] where they were not measured.
        """
        begin = self._places.get((window.document, window.offset))
        if begin is None:
            return
        end = min(begin + window.scored, len(self._words))
        count = end - begin
        self._losses[begin:end] = losses[:count]
        if alone.shape[1]:
            self._alone[begin:end] = alone[:count]
        if window.offset == 0:
            self._gates[begin : end - 1] = gates[1:count]
        else:
            self._gates[begin - 1 : end - 1] = gates[:count]

    def to_dict(self) -> dict[str, Any]:
        """Return what the page's script reads: numbers as bytes in base64, gates in 255 steps of `unit`."""
        count = len(self._words)
        gates, alone = self._gates[:count], self._alone[:count]
        is_routed = ~np.isnan(gates[:, :1, :1])  # [N, 1, 1]
        gates = np.where(is_routed, gates, 0)
        with_mean = np.concatenate([gates.mean(axis=1, keepdims=True), gates], axis=1)  # [N, 1 + L, X]
        first = np.where(is_routed[:, 0], with_mean.argmax(axis=-1), _NOT_ROUTED)
        unit = max(1.0, float(gates.max(initial=0))) / 255
        return {
            "domain": self._domain,
            "tokens": self._words,
            "documents": self._documents,
            "first": _encoded(first.astype("<u2")),
            "weights": _encoded((gates / unit).round().astype(np.uint8)),
            "unit": unit,
            "losses": _encoded(self._losses[:count].astype("<f4")),
            "alone": "" if np.isnan(alone).any() else _encoded(alone.astype("<f4")),
        }


def _encoded(values: NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()
