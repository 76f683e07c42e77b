"""What an evaluation found: a row for each model, and how much of the gap between seed and oracle it closes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from btx_merge.errors import Problem
from btx_merge.measuring.windows import Amount
from btx_merge.sources.source import SEED

MODEL, ROUTED, SOURCE, SOUP, BTM, AGAINST = "model", "routed", "source", "soup", "btm", "against"
"""Kinds of rows: the model that is measured, the same with each domain sent to its own expert, one of its sources,
their dense mean, the sources side by side as Branch-Train-Merge has them, another model."""

_LEAST_GAP = 0.001
"""Of the seed's bits: a choice. Fractions of a smaller gap are figures with many digits that mean nothing."""


@dataclass(frozen=True)
class Score:
    """How well a model predicts a domain."""

    bits_per_byte: float
    """Loss per byte of the text in UTF-8, in bits."""
    perplexity: float
    """Per token: two models can be compared by it only where they read the same tokens."""
    tokens: int
    """Tokens that were scored."""
    same_tokens: bool = True
    """Whether they are those of the model that is measured."""


@dataclass(frozen=True)
class Row:
    """One model."""

    name: str
    """What it is called in tables."""
    kind: str
    """model, routed, source, soup, btm or against."""
    scores: Mapping[str, Score]
    """By domain."""
    closed: Mapping[str, float | None]
    """By domain, the fraction of the gap between seed and oracle that is closed; None where there is no gap."""

    @property
    def mean_closed(self) -> float | None:
        """Over the domains that have a gap."""
        found = [part for part in self.closed.values() if part is not None]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class Oracle:
    """The best single source for a domain."""

    source: str
    """Its name."""
    bits_per_byte: float
    """Its figure."""


@dataclass(frozen=True)
class EvalReport:
    """What an evaluation found."""

    model: str
    """The model that is measured, by the name under which it may be published."""
    domains: Mapping[str, Amount]
    """How much of each was measured, in the model's tokens."""
    rows: tuple[Row, ...]
    """The model that is measured first."""
    oracle: Mapping[str, Oracle]
    """By domain; empty where no sources were measured."""
    window: int
    """Tokens of a window, at most."""
    dtype: str
    """torch's name of the dtype in which all models were computed."""
    device: str
    """torch's name of where."""
    seconds: float
    """How long it took."""
    warnings: tuple[Problem, ...] = ()
    """What should be looked at twice."""
    output: Path | None = None
    """Where the report was written."""

    @property
    def without_gap(self) -> list[str]:
        """Domains for which no source is clearly better than the seed."""
        return [domain for domain in self.oracle if self.rows[0].closed.get(domain) is None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them; null where a number is not finite."""
        rows = []
        for row in self.rows:
            scores = {domain: _finite(asdict(score)) for domain, score in row.scores.items()}
            closed = {"gap_closed": dict(row.closed), "gap_closed_mean": row.mean_closed} if self.oracle else {}
            rows.append({"name": row.name, "kind": row.kind, "scores": scores, **closed})
        domains = {}
        for name, amount in self.domains.items():
            domains[name] = {
                "documents": amount.documents,
                "windows": amount.windows,
                "tokens": amount.tokens,
                "bytes": amount.nbytes,
            }
        return {
            "model": self.model,
            "domains": domains,
            "rows": rows,
            "oracle": {domain: asdict(best) for domain, best in self.oracle.items()},
            "window": self.window,
            "dtype": self.dtype,
            "device": self.device,
            "seconds": self.seconds,
            "warnings": [str(warning) for warning in self.warnings],
            "output": None if self.output is None else str(self.output),
        }


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def oracle_of(rows: Sequence[Row]) -> dict[str, Oracle]:
    """Return the best source for each domain; the seed where none is better."""
    sources = [row for row in rows if row.kind == SOURCE]
    found: dict[str, Oracle] = {}
    for domain in sources[0].scores if sources else ():
        best = min(sources, key=lambda row: (row.scores[domain].bits_per_byte, row.name != SEED))
        found[domain] = Oracle(best.name, best.scores[domain].bits_per_byte)
    return found


def with_gaps(rows: Sequence[Row], oracle: Mapping[str, Oracle]) -> tuple[Row, ...]:
    """Return the rows with the fraction of each gap that they close: (seed - row) / (seed - oracle)."""
    if not oracle:
        return tuple(rows)
    seed = next(row for row in rows if row.kind == SOURCE and row.name == SEED)
    out = []
    for row in rows:
        closed: dict[str, float | None] = {}
        for domain, best in oracle.items():
            bits = seed.scores[domain].bits_per_byte
            gap = bits - best.bits_per_byte
            is_gap = gap > _LEAST_GAP * bits
            closed[domain] = (bits - row.scores[domain].bits_per_byte) / gap if is_gap else None
        out.append(replace(row, closed=closed))
    return tuple(out)
