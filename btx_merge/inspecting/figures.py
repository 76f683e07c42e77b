"""What was found about a model's routing, as plain values that JSON, picture and page are made from.

An *expert* is here what one source became: of a split source, its chunks count as one.

Legend: E experts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from btx_merge.architectures.btx import DEAD

COLD = 0.2
"""Part of its ideal share of the choices, 1 / E, below which an expert of a layer counts as cold."""

Row = tuple[float, ...]
"""A number for each expert, or for each layer."""
Grid = tuple[Row, ...]
"""[L, E]"""


@dataclass(frozen=True)
class WorstToken:
    """A token for which a single expert would have been much better than the route that was taken."""

    before: str
    """The text in front of it."""
    token: str
    after: str
    loss: float
    """Of predicting it on the route that was taken, in nats."""
    best: str
    """The expert that, alone, predicts it best."""
    regret: float
    """The loss less that expert's, in nats."""


@dataclass(frozen=True)
class DomainFigures:
    """The routing of one domain's text."""

    domain: str
    tokens: int
    """That were predicted."""
    routed: int
    """That were routed; a document's last token predicts nothing, so nothing routes it."""
    loss: float
    """Mean negative log-likelihood of a token, in nats."""
    share: Grid
    """Of the choices of experts, the part that went to each: each row adds up to 1."""
    first: Grid
    """Part of the tokens whose first choice each expert is."""
    weight: Grid
    """Mean gate weight, 0 where an expert is not chosen."""
    entropy: Row
    """Of the router's probabilities, mean over the tokens, in nats; at most log(E)."""
    without: Mapping[str, float]
    """The loss with an expert switched off, by its name; empty if that was not measured."""
    alone: Mapping[str, float]
    """The loss with one expert alone."""
    regret: float | None
    """Mean over the tokens of the loss less that of the token's best single expert."""
    worst: tuple[WorstToken, ...] = ()
    """The tokens with the largest regret."""


@dataclass(frozen=True)
class Neglected:
    """An expert of a layer that gets next to nothing."""

    layer: int
    expert: str
    load: float
    """Its part of the choices, mean over the domains."""
    is_dead: bool
    """Whether that is below 1 % of the ideal share; otherwise it is only cold."""


@dataclass(frozen=True)
class ModelFigures:
    """The routing of a model, domain by domain."""

    model: str
    router_type: str
    experts: tuple[str, ...]
    """That tokens may be sent to: those that are switched off are not among them."""
    domains: tuple[DomainFigures, ...]

    @property
    def load(self) -> Grid:
        """Each expert's part of the choices, mean over the domains, however much text each has."""
        layers = []
        for rows in zip(*(domain.share for domain in self.domains), strict=True):
            layers.append(tuple(math.fsum(shares) / len(rows) for shares in zip(*rows, strict=True)))
        return tuple(layers)

    @property
    def neglected(self) -> tuple[Neglected, ...]:
        """The dead and the cold experts of every layer."""
        found, ideal = [], 1 / len(self.experts)
        for layer, loads in enumerate(self.load):
            for expert, load in zip(self.experts, loads, strict=True):
                if load < COLD * ideal:
                    found.append(Neglected(layer, expert, load, load < DEAD * ideal))
        return tuple(found)

    def own_first(self, domain: DomainFigures) -> Row | None:
        """Return by layer the part of a domain's tokens whose first choice is its own expert; None if it has none."""
        if domain.domain not in self.experts:
            return None
        own = self.experts.index(domain.domain)
        return tuple(row[own] for row in domain.first)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with what follows from them."""
        domains = [{**asdict(domain), "own_first": self.own_first(domain)} for domain in self.domains]
        return {
            "model": self.model,
            "router_type": self.router_type,
            "experts": list(self.experts),
            "load": self.load,
            "neglected": [asdict(item) for item in self.neglected],
            "domains": domains,
        }
