"""One run of the study: all models of one random seed, trained, merged and measured with the commands of `btx`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo
from demo import WINDOW
from demo_common import save_untrained, shown
from reproduce_study import Study, active_parameters
from reproduce_texts import DOMAINS, EXPERTS, text_file

BATCH = 8
STEP_TOKENS = WINDOW * BATCH
MODEL = {**demo.MODEL, "vocab_size": 2048}  # of four domains, one of them another language
SEED_MIXTURE = {"english": 0.7, "code": 0.1, "math": 0.1, "german": 0.1}
EQUAL_PARTS = dict.fromkeys(DOMAINS, 1.0)
"""The mixture of a finetuning."""


@dataclass(frozen=True)
class Scale:
    """How large a study is. A step has `STEP_TOKENS` tokens."""

    seed_steps: int
    branch_steps: int
    finetuning_steps: int
    runs: int
    """Of the main rows, each with a random seed of its own for initialisation and order."""
    ablation_runs: int
    branch_rate: float = 1.5e-3
    """Highest learning rate of the seed and of every branch."""
    mixture_rate: float = 1e-3
    """Of every model that is trained on all domains, the dense one included."""

    @property
    def all_steps(self) -> int:
        """Steps of all branches and of a finetuning."""
        return len(EXPERTS) * self.branch_steps + self.finetuning_steps

    @property
    def all_data(self) -> dict[str, float]:
        """The mixture of what all branches and a finetuning see."""
        part = self.finetuning_steps / len(DOMAINS)
        return {domain: part + self.branch_steps * (domain in EXPERTS) for domain in DOMAINS}


@dataclass(frozen=True)
class Row:
    """One model of one run."""

    name: str
    table: str
    run: int
    bits_per_byte: Mapping[str, float]
    """By domain, of held-out text."""
    tokens: int
    """That were trained on for it, behind the seed."""
    flops: float
    """Of the same trainings: 6 x active parameters x tokens."""
    cpu_seconds: float
    """Of the same trainings, and of merges and fits."""


class Run:
    """The models of one random seed, and a row for each that was measured."""

    def __init__(self, study: Study, scale: Scale, number: int, texts: Path):
        self.study, self.scale, self.number, self.texts = study, scale, number, texts
        self.folder = study.folder / str(number)
        self.made_by: dict[Path, tuple[Path, ...]] = {}
        """By model, the steps behind the seed that led to it."""
        self.tokens: dict[Path, int] = {}
        """By step, the tokens that it trained on."""
        self.rows: list[Row] = []

    # -- models

    def dense_models(self) -> None:
        """Train the seed, the experts, and the dense model that sees all that experts and a finetuning see."""
        untrained, scale = self.folder / "untrained", self.scale
        files = [text_file(self.texts, domain, "training") for domain in DOMAINS]
        what = [MODEL, self.number]
        self.study.step(untrained, what, lambda: save_untrained(untrained, MODEL, files, self.number))
        seed = self.branch(untrained, "seed", SEED_MIXTURE, scale.seed_steps, scale.branch_rate)
        self.made_by[seed] = ()
        for domain in EXPERTS:
            self.branch(seed, domain, {domain: 1.0}, scale.branch_steps, scale.branch_rate)
        self.branch(seed, "dense", scale.all_data, scale.all_steps, scale.mixture_rate)

    def branch(self, model: Path, name: str, data: Mapping[str, float], steps: int, rate: float, *more: str) -> Path:
        """Train a dense model."""
        return self._trained("branch", model, name, data, steps, rate, more)

    def finetuned(self, model: Path, name: str, data: Mapping[str, float], steps: int, *more: str) -> Path:
        """Train a merged model: every weight of it, unless `more` says otherwise."""
        more = more if "--train" in more else ("--train", "all", *more)
        return self._trained("train", model, name, data, steps, self.scale.mixture_rate, more)

    def merged(self, name: str, *words: str, experts: Mapping[str, str] | None = None, fitted: bool = False) -> Path:
        """Merge the seed and experts.

        Args:
            experts: names of their models by the experts' names; those of the three domains if not given.
            fitted: whether texts are given to a fit.
        """
        experts = experts or dict(zip(EXPERTS, EXPERTS, strict=True))
        sources = ["--seed", shown(self.folder / "seed")]
        for expert, model in experts.items():
            sources += ["--expert", f"{expert}={shown(self.folder / model)}"]
        texts = self.texts_words("--domain-text", "training", dict.fromkeys(EXPERTS, 1.0)) if fitted else []
        words = (*words, *texts, "--random-seed", str(self.number))
        output = self.study.btx(self.folder / name, "merge", *sources, *words)
        branches = dict.fromkeys(step for model in experts.values() for step in self.made_by[self.folder / model])
        self.made_by[output] = (*branches, output)
        return output

    def _trained(
        self,
        verb: str,
        model: Path,
        name: str,
        data: Mapping[str, float],
        steps: int,
        rate: float,
        more: Sequence[str],
    ) -> Path:
        words = [shown(model), *self.texts_words("--data", "training", data), "--max-steps", str(steps)]
        words += ["--learning-rate", str(rate), "--seed", str(self.number), "--max-length", str(WINDOW)]
        words += ["--per-device-train-batch-size", str(BATCH), "--holdout", "0", "--report-to", "none", *more]
        output = self.study.btx(self.folder / name, verb, *words)
        self.tokens[output] = steps * STEP_TOKENS
        self.made_by[output] = (*self.made_by.get(model, ()), output)
        return output

    # -- figures

    def measure(self, table: str, name: str, model: Path) -> None:
        """Measure a merged model by itself."""
        report = self._evaluated(model.name, model, "--no-sources")
        self._add(table, name, report["rows"][0], self.made_by[model])

    def measure_dense_models(self, table: str, merged: Path) -> None:
        """Measure all that a merge was made of, its soup, Branch-Train-Merge, and one dense model trained on all."""
        experts = {name: self.folder / name for name in EXPERTS}
        made_by = {
            "seed": (),
            "dense": (self.folder / "dense",),
            **{name: (expert,) for name, expert in experts.items()},
        }
        btm = self.texts_words("--btm-text", "training", dict.fromkeys(EXPERTS, 1.0))
        words = ["--soup", "--btm", "1", *btm, "--against", f"dense={shown(self.folder / 'dense')}"]
        first = self._evaluated("dense-models", merged, *words)
        second = self._evaluated("btm-2", merged, "--btm", "2", *btm)
        rows = [row for row in first["rows"] if row["kind"] != "model"]  # the merge itself is measured elsewhere
        rows += [row for row in second["rows"] if row["kind"] == "btm"]
        for row in rows:
            self._add(table, row["name"], row, made_by.get(row["name"], tuple(experts.values())))

    def _evaluated(self, name: str, model: Path, *words: str) -> dict[str, Any]:
        texts = self.texts_words("--data", "held-out", EQUAL_PARTS)
        folder = self.study.btx(self.folder / "measured" / name, "eval", shown(model), *texts, *words)
        report: dict[str, Any] = json.loads((folder / "eval.json").read_text())
        return report

    def _add(self, table: str, name: str, found: Mapping[str, Any], steps: Sequence[Path]) -> None:
        bits = {domain: score["bits_per_byte"] for domain, score in found["scores"].items()}
        trainings = [step for step in steps if step in self.tokens]
        tokens = sum(self.tokens[step] for step in trainings)
        flops = sum(6.0 * active_parameters(step) * self.tokens[step] for step in trainings)
        self.rows.append(Row(name, table, self.number, bits, tokens, flops, self.study.cost(steps).cpu_seconds))

    def texts_words(self, flag: str, part: str, weights: Mapping[str, float]) -> list[str]:
        """Return the words that give a command a part of each domain's text, with weights unless all are alike."""
        alike = len(set(weights.values())) == 1
        words = []
        for domain, weight in weights.items():
            text = shown(text_file(self.texts, domain, part))
            words += [flag, f"{domain}={text}" if alike else f"{domain}={text}:{weight:g}"]
        return words
