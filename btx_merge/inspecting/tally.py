"""What is added up over the tokens of a domain. Its size does not depend on how many there are.

Legend: N tokens of a window, R of them routed as text, X experts with their chunks as one, L layers.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from btx_merge.inspecting.figures import DomainFigures, Grid, WorstToken
from btx_merge.inspecting.routes import LayerRoutes

_WORST = 12
"""Tokens of the largest regret that are kept of each domain."""


@dataclass(frozen=True)
class WindowLosses:
    """The losses of a window's tokens, in nats."""

    routed: torch.Tensor
    """[N], on the route that the model takes."""
    without: torch.Tensor
    """[X, N], with each expert switched off; NaN where it is the only one. Or [0, N]: not measured."""
    alone: torch.Tensor
    """[X, N], with each expert alone; or [0, N]."""

    @property
    def regret(self) -> torch.Tensor:
        """[N], the loss less that of the token's best single expert."""
        return self.routed - self.alone.amin(dim=0)


class Tally:
    """Sums over the tokens of one domain."""

    def __init__(self, domain: str, experts: Sequence[str], layers: int):
        self._domain, self._experts = domain, list(experts)
        shape = layers, len(self._experts)
        self._choices, self._first, self._gates = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
        self._entropy = torch.zeros(layers, dtype=torch.float64)
        self._routed = self._tokens = self._kept = 0
        self._loss = self._regret = torch.zeros((), dtype=torch.float64)
        self._without: torch.Tensor = torch.zeros(0)
        self._alone: torch.Tensor = torch.zeros(0)
        self._worst: list[tuple[float, int, WorstToken]] = []

    def add_routes(self, layers: Sequence[LayerRoutes], is_text: torch.Tensor) -> None:
        """Count the positions of a pass that hold text; the prefix of a document is none.

        Args:
            is_text: [S] bool, of the positions that were looked at.
        """
        self._routed += int(is_text.sum())
        for layer, routes in enumerate(layers):
            gates = routes.gates[is_text]
            chosen = gates.argmax(dim=-1)
            self._first[layer] += torch.bincount(chosen, minlength=len(self._experts))
            self._gates[layer] += gates.double().sum(dim=0)
            self._choices[layer] += routes.choices[is_text].double().sum(dim=0)
            self._entropy[layer] += routes.entropy[is_text].double().sum()

    def add_losses(self, losses: WindowLosses, word: Callable[[int], tuple[str, str, str]]) -> None:
        """Add the losses of a window.

        Args:
            word: returns the text before a token of the window, the token's, and the text after it. It is called for
                tokens that are among the worst so far.
        """
        self._tokens += len(losses.routed)
        self._loss = self._loss + losses.routed.double().sum()
        if not len(losses.alone):
            return
        alone, without = losses.alone.double().sum(dim=1), losses.without.double().sum(dim=1)
        self._alone = alone if not len(self._alone) else self._alone + alone
        self._without = without if not len(self._without) else self._without + without
        regret = losses.regret
        self._regret = self._regret + regret.double().sum()
        best = losses.alone.argmin(dim=0).tolist()
        for place in regret.topk(min(_WORST, len(regret))).indices.tolist():
            value = float(regret[place])
            if len(self._worst) == _WORST and value <= self._worst[0][0]:
                break
            before, token, after = word(place)
            expert = self._experts[best[place]]
            worst = WorstToken(before, token, after, float(losses.routed[place]), expert, value)
            self._kept += 1  # where two are equal, the earlier one is the worse
            heapq.heappush(self._worst, (value, -self._kept, worst))
            if len(self._worst) > _WORST:
                heapq.heappop(self._worst)

    def figures(self) -> DomainFigures:
        """Return the means."""
        routed = max(1, self._routed)
        choices = self._choices.sum(dim=-1, keepdim=True).clamp(min=1)
        is_measured = len(self._alone) > 0
        return DomainFigures(
            domain=self._domain,
            tokens=self._tokens,
            routed=self._routed,
            loss=float(self._loss) / self._tokens,
            share=_grid(self._choices / choices),
            first=_grid(self._first / routed),
            weight=_grid(self._gates / routed),
            entropy=tuple((self._entropy / routed).tolist()),
            without=self._by_expert(self._without),
            alone=self._by_expert(self._alone),
            regret=float(self._regret) / self._tokens if is_measured else None,
            worst=tuple(item for _, _, item in sorted(self._worst, reverse=True, key=lambda entry: entry[:2])),
        )

    def _by_expert(self, losses: torch.Tensor) -> dict[str, float]:
        """Return the mean over the tokens of each expert's losses; nothing if they were not measured."""
        if not len(losses):
            return {}
        means = zip(self._experts, (losses / self._tokens).tolist(), strict=True)
        return {name: mean for name, mean in means if not math.isnan(mean)}  # NaN: the only one is never switched off


def _grid(values: torch.Tensor) -> Grid:
    return tuple(tuple(row) for row in values.tolist())
