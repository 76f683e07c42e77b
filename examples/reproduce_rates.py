"""The learning rates of `reproduce.py`: every kind of training at several rates, measured on validation text.

    make reproduce ARGS=--rates

All trainings have half the steps of the study. The seed's rate is the demo's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from reproduce_run import Run
from reproduce_texts import EXPERTS
from steps import shown

TRAININGS = (7e-4, 1.5e-3, 3e-3)
BRANCHES = (3.5e-4, *TRAININGS)
FINETUNINGS = (1.75e-4, 3.5e-4, 7e-4, 1.5e-3)
FINETUNINGS_OF_FITS = (8.75e-5, *FINETUNINGS, 3e-3)
"""The rates that are tried."""
Bits = dict[float, float]
"""By rate, the bits per byte of validation text, mean over the domains."""


def try_rates(run: Run) -> dict[str, Bits]:
    """Measure every kind of training that the study compares, at several rates.

    Branches are measured by what they are for: a merge of them, finetuned, at the best rate for that.

    Args:
        run: a run that is scored on validation text.
    """
    run.seed_model()
    upcycled = run.upcycled()
    dense = {rate: run.dense_model(f"dense-{rate:g}", rate) for rate in TRAININGS}
    found = {
        "dense": _dense_bits(run, upcycled, dense),
        "upcycled": _finetuned_bits(run, upcycled, "upcycled", TRAININGS),
    }
    finetuned = {}
    for rate in BRANCHES:
        merge = run.merged(f"merged-{rate:g}", experts=branches(run, rate))
        finetuned[rate] = _finetuned_bits(run, merge, "merged", FINETUNINGS)
    found["branch"] = {rate: min(bits.values()) for rate, bits in finetuned.items()}
    rate = best(found["branch"])
    found["merged"] = finetuned[rate]
    fitted = run.merged("fitted", experts=branches(run, rate), fitted=True)
    for kind in ("fitted", "taught"):
        found[kind] = _finetuned_bits(run, fitted, kind, FINETUNINGS_OF_FITS)
    return found


def branches(run: Run, rate: float) -> dict[str, str]:
    """Train the seed on each expert's domain; return the models' names by the experts' names."""
    return {domain: run.expert(f"{domain}-{rate:g}", domain, rate=rate).name for domain in EXPERTS}


def best(bits: Bits) -> float:
    """Return the rate with the fewest bits."""
    return min(bits, key=lambda rate: bits[rate])


def _finetuned_bits(run: Run, model: Path, kind: str, rates: Sequence[float]) -> Bits:
    """Finetune a merged model at every rate, and measure what comes out."""
    models = {rate: run.finetuned(model, f"{model.name}-as-{kind}-{rate:g}", kind, rate=rate) for rate in rates}
    return {rate: _bits(run, finetuned) for rate, finetuned in models.items()}


def _bits(run: Run, model: Path) -> float:
    """Measure a merged model."""
    (row,) = run.evaluated(model.name, model, "--no-sources")["rows"]
    return _mean_bits(row)


def _dense_bits(run: Run, merged: Path, models: Mapping[float, Path]) -> Bits:
    """Measure dense models, which `btx eval` does beside a merged one."""
    others = [word for rate, model in models.items() for word in ("--against", f"{rate:g}={shown(model)}")]
    rows = {row["name"]: row for row in run.evaluated("dense", merged, "--no-sources", *others)["rows"]}
    return {rate: _mean_bits(rows[f"{rate:g}"]) for rate in models}


def _mean_bits(row: Mapping[str, Any]) -> float:
    """Return the mean over the domains of a line of `btx eval`'s report."""
    return float(mean(score["bits_per_byte"] for score in row["scores"].values()))
