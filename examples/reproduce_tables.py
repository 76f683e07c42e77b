"""The tables of `reproduce.py`, in Markdown, from its figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

from reproduce_texts import DOMAINS, EXPERTS

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Claim:
    """An ordering that a paper reports, between two rows of our tables."""

    text: str
    better: str
    worse: str
    source: str
    """Where it stands, with its figures."""


_TABLE_2, _TABLE_3 = "BTX, main table: ", "BTX, ablations: "
CLAIMS = (
    Claim("BTX before one dense model, same data", "BTX Top-2", "dense", _TABLE_2 + "47.9, 44.5"),
    Claim(
        "BTX before sparse upcycling, same compute",
        "BTX Top-2",
        "sparse upcycling, compute-matched",
        _TABLE_2 + "47.9, 46.3",
    ),
    Claim("BTX before Branch-Train-Merge", "BTX Top-2", "Branch-Train-Merge, top 2", _TABLE_2 + "47.9, 43.4"),
    Claim("BTX: Top-2 before Sample Top-1", "BTX Top-2", "BTX Sample Top-1", _TABLE_2 + "47.9, 47.3"),
    Claim("sparse upcycling before dense", "sparse upcycling, compute-matched", "dense", _TABLE_2 + "46.3, 44.5"),
    Claim("dense before Branch-Train-Merge", "dense", "Branch-Train-Merge, top 2", _TABLE_2 + "44.5, 43.4"),
    Claim(
        "Branch-Train-Merge: two before one",
        "Branch-Train-Merge, top 2",
        "Branch-Train-Merge, top 1",
        _TABLE_2 + "43.4, 43.1",
    ),
    Claim("balancing costs nothing", "BTX Top-2", "BTX Top-2, no balancing", _TABLE_3 + "34.7, 34.6"),
    Claim(
        "frozen experts cost nothing",
        "Top-2, experts frozen, no balancing",
        "BTX Top-2, no balancing",
        _TABLE_3 + "34.7, 34.6",
    ),
    Claim("blended experts are far worse", "BTX Top-2", "blend", _TABLE_3 + "34.7, 22.2"),
    Claim("split experts are worse, top-2 of 8", "BTX Top-2", "split, top-2 of 8", _TABLE_3 + "34.7, 28.0"),
    Claim("split experts are no better, top-4 of 8", "BTX Top-2", "split, top-4 of 8", _TABLE_3 + "34.7, 34.5"),
    Claim("Soft before Top-2", "Soft, no balancing", "BTX Top-2, no balancing", _TABLE_3 + "35.8, 34.6"),
    Claim(
        "Top-2 before Sample Top-1, no balancing",
        "BTX Top-2, no balancing",
        "Sample Top-1, no balancing",
        _TABLE_3 + "34.6, 33.0",
    ),
    Claim(
        "Sample Top-1 before Switch",
        "Sample Top-1, no balancing",
        "Switch, no balancing",
        _TABLE_3 + "33.0, 24.7",
    ),
    Claim("TIES before the mean", "TIES at scale 0.5", "BTX Top-2", "MergeME: +7 % relative"),
    Claim("DARE before the mean", "DARE", "BTX Top-2", "MergeME: +10 % relative"),
    Claim("a dense router gradient helps", "dense router gradient", "BTX Top-2", "DenseMixer: +2.2 to +2.9"),
    Claim(
        "balance over the step, not the micro-batch",
        "4 micro-batches a step, balanced together",
        "4 micro-batches a step, each balanced",
        "Demons in the Detail: MMLU +1.9 to +2.3",
    ),
)
"""What is compared with the BTX paper (arXiv 2403.07816), and with what came after it."""


SHORT = {
    "Branch-Train-Merge, two of four": "Branch-Train-Merge, top 2",
    "one dense model": "dense",
    "BTX as in the paper": "BTX Top-2",
    "fitted by btx-merge, without training": "fitted by text alone",
    "the same, finetuned as long as BTX, taught by the sources": (
        "fitted by text alone, then finetuned, taught by the sources"
    ),
}
"""The rows of the shortest table, by what they are called there."""


def tables(figures: Mapping[str, Any]) -> str:
    """Return all tables of a study, each under its name."""
    return "\n".join(f"\n### {name.capitalize()}\n\n{table}" for name, table in blocks(figures).items())


def blocks(figures: Mapping[str, Any]) -> dict[str, str]:
    """Return each table of a study by its name, in Markdown."""
    rows: Rows = figures["rows"]
    found = {"in short": short_table(rows), "set-up": setup_table(figures)}
    if figures["rates"]:
        found["learning rates"] = rates_table(figures["rates"])
    found |= {name: table_of(rows, name) for name in dict.fromkeys(row["table"] for row in rows)}
    found["claims"] = claims_table(rows)
    found["routing"] = routing_table(figures["routing"])
    found["throughput"] = throughput_table(figures["throughput"])
    return found


def setup_table(figures: Mapping[str, Any]) -> str:
    """Return what the study trained, and what that cost."""
    scale, machine = figures["scale"], figures["machine"]
    tokens = figures["step_tokens"]
    lines = {
        "parameters of a dense model": f"{figures['parameters']:,}",
        "steps of the seed": f"{scale['seed_steps']:,}",
        "steps of each branch": f"{scale['branch_steps']:,}",
        "steps of a finetuning": f"{scale['finetuning_steps']:,}",
        "tokens of a step": f"{tokens:,}",
        "runs, each with its own random seed": f"{scale['runs']}, of ablations {scale['ablation_runs']}",
        "CPU time of all runs": f"{figures['cpu_seconds'] / 3600:.1f} hours on {machine['cores']} cores",
        "made with": ", ".join(f"{name} {machine[name]}" for name in ("btx-merge", "torch", "transformers", "python")),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines.items())])


def rates_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return a line for each kind of training: its bits per byte of validation text by rate, the least in bold."""
    rates = sorted({rate for bits in found.values() for rate in bits}, key=float)
    heads = [f"{float(rate):.7f}".rstrip("0") for rate in rates]
    lines = [f"| training | {' | '.join(heads)} |", "|---|" + "---|" * len(rates)]
    for kind, bits in found.items():
        cells = {rate: f"{value:.3f}" for rate, value in bits.items()}
        best = min(bits, key=bits.__getitem__)
        cells[best] = f"**{cells[best]}**"
        lines.append(f"| {kind} | {' | '.join(cells.get(rate, '') for rate in rates)} |")
    return "\n".join(lines)


def claims_table(rows: Rows) -> str:
    """Return a line for each claim: by how much its first model is better here, and in how many runs.

    Runs are compared in pairs: both models of a pair come from the same seed, and see tokens in the same order.
    """
    bits = {(row["name"], row["run"]): mean_bits(row) for row in rows}
    lines = ["| claim | where it stands | bits per byte less, here | in runs |", "|---|---|---|---|"]
    for claim in CLAIMS:
        runs = [run for name, run in bits if name == claim.worse and (claim.better, run) in bits]
        if not runs:
            continue
        less = [bits[claim.worse, run] - bits[claim.better, run] for run in runs]
        better = sum(value > 0 for value in less)
        lines.append(f"| {claim.text} | {claim.source} | {spread(less, '+.4f')} | {better} of {len(runs)} |")
    return "\n".join(lines)


def throughput_table(throughput: Mapping[str, Sequence[float]]) -> str:
    """Return the seconds of each way to train on the same tokens, and the ratio of their medians."""
    lines = ["| two processes, one thread each | seconds, three times in turns | ratio of medians |", "|---|---|---|"]
    first = median(next(iter(throughput.values())))
    for name, seconds in throughput.items():
        taken = ", ".join(f"{value:.1f}" for value in seconds)
        lines.append(f"| {name} | {taken} | {median(seconds) / first:.2f} |")
    return "\n".join(lines)


def table_of(rows: Rows, table: str) -> str:
    """Return one table: a line for each model, with the mean over its runs and their standard deviation."""
    lines = [
        f"| model | {' | '.join(DOMAINS)} | mean | gap closed | tokens | FLOPs | CPU s | runs |",
        "|---|" + "---|" * (len(DOMAINS) + 6),
    ]
    for name in dict.fromkeys(row["name"] for row in rows if row["table"] == table):
        own = [row for row in rows if row["name"] == name and row["table"] == table]
        bits = [spread([row["bits_per_byte"][domain] for row in own], ".3f") for domain in DOMAINS]
        bits.append(spread([mean_bits(row) for row in own], ".3f"))
        closed = f"{spread([100 * gap_closed(row, rows) for row in own], '.0f')} %"
        tokens, flops = f"{own[0]['tokens'] / 1e6:.2f} M", f"{own[0]['flops'] / 1e12:.1f} T"
        seconds = f"{mean(row['cpu_seconds'] for row in own):.0f}"
        lines.append("| " + " | ".join([name, *bits, closed, tokens, flops, seconds, str(len(own))]) + " |")
    return "\n".join(lines)


def short_table(rows: Rows) -> str:
    """Return how some models compare, in the mean over the domains."""
    lines = ["| | bits per byte | gap closed |", "|---|---|---|"]
    for label, name in SHORT.items():
        own = [row for row in rows if row["name"] == name]
        bits = spread([mean_bits(row) for row in own], ".3f")
        lines.append(f"| {label} | {bits} | {percent(mean(gap_closed(row, rows) for row in own))} |")
    return "\n".join(lines)


def mean_bits(row: Mapping[str, Any]) -> float:
    """Return a model's bits per byte, mean over the domains."""
    return float(mean(row["bits_per_byte"].values()))


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
    middle = f"{mean(values):{form}}".replace("-", "\N{MINUS SIGN}")
    return f"{middle} ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else middle


def routing_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each model: where tokens go in each layer, mean over the runs, and who is neglected in which.

    What is dead and what is only cold, `btx routing` decides; so the layers are separated by run.
    """
    lines = [
        "| model | own expert first, by layer | least used expert, by layer | dead | cold |",
        "|---|---|---|---|---|",
    ]
    for name in runs[0]:
        models = [run[name] for run in runs]
        own = [domain["own_first"] for model in models for domain in model["domains"] if domain["own_first"]]
        least = [[min(layer) for layer in model["load"]] for model in models]
        dead = [named(item for item in model["neglected"] if item["is_dead"]) for model in models]
        cold = [named(item for item in model["neglected"] if not item["is_dead"]) for model in models]
        cells = [name, by_layer(own), by_layer(least), "; ".join(dead), "; ".join(cold)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def by_layer(models: Sequence[Sequence[float]]) -> str:
    """Return the mean of each layer.

    >>> by_layer([[0.5, 0.25], [0.25, 0.25]])
    '38 %, 25 %'
    """
    return ", ".join(percent(mean(layer)) for layer in zip(*models, strict=True))


def percent(value: float) -> str:
    """Return a fraction as a text has it.

    >>> percent(0.123)
    '12 %'
    """
    return f"{100 * value:.0f} %"


def named(neglected: Iterable[Mapping[str, Any]]) -> str:
    """Return experts with their layers.

    >>> named([{"expert": "code", "layer": 0}, {"expert": "code", "layer": 3}])
    'code (0, 3)'
    """
    layers: dict[str, list[str]] = {}
    for item in neglected:
        layers.setdefault(item["expert"], []).append(str(item["layer"]))
    return ", ".join(f"{expert} ({', '.join(found)})" for expert, found in layers.items()) or "none"
