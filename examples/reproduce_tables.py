"""The tables of `reproduce.py`, in Markdown, from its figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from reproduce_texts import DOMAINS, EXPERTS

Rows = Sequence[Mapping[str, Any]]


def tables(figures: Mapping[str, Any]) -> str:
    """Return all tables of a study."""
    rows: Rows = figures["rows"]
    names = dict.fromkeys(row["table"] for row in rows)
    parts = [table_of(rows, name) for name in names]
    parts.append(routing_table(figures["routing"]))
    return "\n".join(parts)


def table_of(rows: Rows, table: str) -> str:
    """Return one table: a line for each model, with the mean over its runs and their standard deviation."""
    lines = [
        f"\n### {table.capitalize()}\n",
        f"| model | {' | '.join(DOMAINS)} | mean | gap closed | tokens | FLOPs | CPU s | runs |",
        "|---|" + "---|" * (len(DOMAINS) + 6),
    ]
    for name in dict.fromkeys(row["name"] for row in rows if row["table"] == table):
        own = [row for row in rows if row["name"] == name and row["table"] == table]
        bits = [spread([row["bits_per_byte"][domain] for row in own], ".3f") for domain in DOMAINS]
        bits.append(spread([mean(row["bits_per_byte"].values()) for row in own], ".3f"))
        closed = spread([gap_closed(row, rows) for row in own], ".0%")
        tokens, flops = f"{own[0]['tokens'] / 1e6:.2f} M", f"{own[0]['flops'] / 1e12:.1f} T"
        seconds = f"{mean(row['cpu_seconds'] for row in own):.0f}"
        lines.append("| " + " | ".join([name, *bits, closed, tokens, flops, seconds, str(len(own))]) + " |")
    return "\n".join(lines)


def gap_closed(row: Mapping[str, Any], rows: Rows) -> float:
    """Return the fraction of the gap between seed and oracle that a model closes, mean over the experts' domains.

    The oracle takes the best single source for each domain. Both are of the same run.
    """
    sources = [other for other in rows if other["run"] == row["run"] and other["name"] in ("seed", *EXPERTS)]
    seed = next(source for source in sources if source["name"] == "seed")["bits_per_byte"]
    closed = []
    for domain in EXPERTS:
        best = min(source["bits_per_byte"][domain] for source in sources)
        if best < seed[domain]:
            closed.append((seed[domain] - row["bits_per_byte"][domain]) / (seed[domain] - best))
    return float(mean(closed))


def spread(values: Sequence[float], form: str) -> str:
    """Return a mean, and the standard deviation where there are several.

    >>> spread([1.0, 2.0], ".1f")
    '1.5 ± 0.7'
    """
    middle = f"{mean(values):{form}}"
    return f"{middle} ± {stdev(values):{form}}" if len(values) > 1 else middle


def routing_table(routing: Mapping[str, Any]) -> str:
    """Return a line for each model: the tokens whose first choice is their own expert, by layer; who is neglected."""
    lines = ["\n### Routing\n", "| model | own expert first, by layer | dead | cold |", "|---|---|---|---|"]
    for name, model in routing.items():
        own = [domain["own_first"] for domain in model["domains"] if domain["own_first"] is not None]
        by_layer = [f"{mean(layer):.0%}" for layer in zip(*own, strict=True)]
        dead = named(item for item in model["neglected"] if item["is_dead"])
        cold = named(item for item in model["neglected"] if not item["is_dead"])
        lines.append(f"| {name} | {', '.join(by_layer)} | {dead} | {cold} |")
    return "\n".join(lines)


def named(neglected: Iterable[Mapping[str, Any]]) -> str:
    """Return experts with their layers.

    >>> named([{"expert": "code", "layer": 0}, {"expert": "code", "layer": 3}])
    'code (0, 3)'
    """
    layers: dict[str, list[str]] = {}
    for item in neglected:
        layers.setdefault(item["expert"], []).append(str(item["layer"]))
    return ", ".join(f"{expert} ({', '.join(found)})" for expert, found in layers.items()) or "none"
