"""One run of the study: all models of one random seed, trained, merged and measured with the commands of `btx`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import demo
from demo import WINDOW
from demo_common import save_untrained
from reproduce_texts import DOMAINS, EXPERTS, text_file
from steps import Steps, shown

from btx_merge import info
from btx_merge.files.folder import read_json

BATCH = 8
STEP_TOKENS = WINDOW * BATCH
MODEL = {**demo.MODEL, "vocab_size": 2048}  # of four domains, one of them another language
SEED_MIXTURE = {"english": 0.4, "code": 0.2, "math": 0.2, "german": 0.2}
EQUAL_PARTS = dict.fromkeys(DOMAINS, 1.0)
"""The mixture of a finetuning."""
FIT_TOKENS = 50_000
"""Of each domain, that a fit reads."""
RATES = {
    "seed": 3e-3,
    "branch": 1.5e-3,
    "dense": 1.5e-3,
    "upcycled": 1.5e-3,
    "merged": 3.5e-4,
    "fitted": 1.75e-4,
    "taught": 3.5e-4,
}
"""Highest learning rate of each kind of training, the best of `reproduce_rates.py` on validation text."""


@dataclass(frozen=True)
class Scale:
    """How large a study is. A step has `STEP_TOKENS` tokens."""

    seed_steps: int
    branch_steps: int
    finetuning_steps: int
    runs: int
    """Of the main rows, each with a random seed of its own for initialisation and order."""
    ablation_runs: int
    scored_tokens: int | None = None
    """Of each domain's held-out text, at most."""
    rates: Mapping[str, float] = field(default_factory=lambda: RATES)
    """Highest learning rate of each kind of training."""

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


class Study(Steps):
    """The finished steps of a run. Several runs go on side by side, so each says what it does, and no more."""

    is_quiet = True


class Run:
    """The models of one random seed, and a row for each that was measured."""

    def __init__(self, study: Study, scale: Scale, number: int, texts: Path, scored: str = "held-out"):
        self.study, self.scale, self.number, self.texts, self.scored = study, scale, number, texts, scored
        self.folder = study.folder
        self.seed = self.folder / "seed"
        self.made_by: dict[Path, tuple[Path, ...]] = {}
        """By model, the steps behind the seed that led to it."""
        self.tokens: dict[Path, int] = {}
        """By training, the tokens that it trained on."""
        self.flops: dict[Path, float] = {}
        """By training, 6 x active parameters x tokens."""
        self.rows: list[Row] = []

    # -- models

    def dense_models(self) -> None:
        """Train the seed, the experts, and the dense model that sees all that experts and a finetuning see."""
        self.seed_model()
        for domain in EXPERTS:
            self.expert(domain, domain)
        self.dense_model("dense")

    def untrained(self) -> Path:
        """Save a Llama with random weights and a tokenizer of all four domains."""
        untrained = self.folder / "untrained"
        files = [text_file(self.texts, domain, "training") for domain in DOMAINS]
        return self.study.step(
            untrained, [MODEL, self.number], lambda: save_untrained(untrained, MODEL, files, self.number)
        )

    def seed_model(self) -> None:
        """Train the seed."""
        steps, rate = self.scale.seed_steps, self.scale.rates["seed"]
        self._trained("branch", self.untrained(), self.seed.name, SEED_MIXTURE, steps, rate)
        self.made_by[self.seed] = ()

    def expert(self, name: str, domain: str, *more: str, rate: float | None = None) -> Path:
        """Train the seed on its domain."""
        rate = rate or self.scale.rates["branch"]
        return self._trained("branch", self.seed, name, {domain: 1.0}, self.scale.branch_steps, rate, *more)

    def dense_model(self, name: str, rate: float | None = None) -> Path:
        """Train the seed on all that experts and a finetuning see."""
        rate = rate or self.scale.rates["dense"]
        return self._trained("branch", self.seed, name, self.scale.all_data, self.scale.all_steps, rate)

    def finetuned(
        self, model: Path, name: str, kind: str, *more: str, steps: int | None = None, rate: float | None = None
    ) -> Path:
        """Train a merged model: every weight of it, unless `more` says otherwise.

        Args:
            kind: whose learning rate is taken: "upcycled", which sees what branches and a finetuning see, "merged",
                "fitted", or "taught", which the sources teach.
            steps: where they are not those of a finetuning, or of all branches and it.
        """
        more = more if "--train" in more else ("--train", "all", *more)
        more = ("--teacher", "sources", *more) if kind == "taught" else more
        data, usual = EQUAL_PARTS, self.scale.finetuning_steps
        if kind == "upcycled":
            data, usual = self.scale.all_data, self.scale.all_steps
        return self._trained("train", model, name, data, steps or usual, rate or self.scale.rates[kind], *more)

    def upcycled(self) -> Path:
        """Merge copies of the seed: sparse upcycling, before its training."""
        copies = {f"copy{number + 1}": self.seed.name for number in range(len(EXPERTS))}
        return self.merged("upcycled", "--combine", "seed", experts=copies)

    def merged(self, name: str, *words: str, experts: Mapping[str, str] | None = None, fitted: bool = False) -> Path:
        """Merge the seed and experts.

        Args:
            experts: names of their models by the experts' names; those of the three domains if not given.
            fitted: whether texts are given to a fit.
        """
        experts = experts or dict(zip(EXPERTS, EXPERTS, strict=True))
        sources = ["--seed", shown(self.seed)]
        for expert, model in experts.items():
            sources += ["--expert", f"{expert}={shown(self.folder / model)}"]
        words = (*words, "--random-seed", str(self.number))
        if fitted:
            texts = self.texts_words("--domain-text", "training", EQUAL_PARTS)
            words = (*words, *texts, "--domain-tokens", str(FIT_TOKENS))
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
        *more: str,
    ) -> Path:
        words = [shown(model), *self.texts_words("--data", "training", data), "--max-steps", str(steps)]
        words += ["--learning-rate", str(rate), "--seed", str(self.number), "--max-length", str(WINDOW)]
        words += ["--per-device-train-batch-size", str(BATCH), "--holdout", "0", "--report-to", "none", *more]
        output = self.study.btx(self.folder / name, verb, *words)
        self.tokens[output] = steps * STEP_TOKENS
        self.flops[output] = 6.0 * active_parameters(output) * self.tokens[output]
        self.made_by[output] = (*self.made_by.get(model, ()), output)
        return output

    # -- figures

    def measure(self, table: str, name: str, model: Path) -> None:
        """Measure a merged model by itself."""
        report = self.evaluated(model.name, model, "--no-sources")
        self._add(table, name, report["rows"][0], self.made_by[model])

    def measure_dense_models(self, table: str, merged: Path) -> None:
        """Measure what a model was made of, its soup, Branch-Train-Merge, and one dense model trained on all."""
        experts = {name: self.folder / name for name in EXPERTS}
        made_by = {
            "seed": (),
            "dense": (self.folder / "dense",),
            **{name: (expert,) for name, expert in experts.items()},
        }
        btm = self.texts_words("--btm-text", "training", EQUAL_PARTS)
        words = ["--soup", "--btm", "1", "--btm", "2", *btm, "--against", f"dense={shown(self.folder / 'dense')}"]
        for row in self.evaluated("dense-models", merged, *words)["rows"]:
            if row["kind"] != "model":  # which has a row elsewhere
                self._add(table, row["name"], row, made_by.get(row["name"], tuple(experts.values())))

    def evaluated(self, name: str, model: Path, *words: str) -> dict[str, Any]:
        """Return the report of `btx eval` on the texts that this run is scored on."""
        texts = self.scored_words()
        folder = self.study.btx(self.folder / "measured" / name, "eval", shown(model), *texts, *words)
        return read_json(folder / "eval.json")

    def _add(self, table: str, name: str, found: Mapping[str, Any], steps: Sequence[Path]) -> None:
        bits = {domain: score["bits_per_byte"] for domain, score in found["scores"].items()}
        tokens = sum(self.tokens.get(step, 0) for step in steps)
        flops = sum(self.flops.get(step, 0.0) for step in steps)
        self.rows.append(Row(name, table, self.number, bits, tokens, flops, self.study.cost(steps).cpu_seconds))

    def scored_words(self) -> list[str]:
        """Return the words that give a command the text that this run is scored on."""
        texts = self.texts_words("--data", self.scored, EQUAL_PARTS)
        return texts if self.scale.scored_tokens is None else [*texts, "--tokens", str(self.scale.scored_tokens)]

    def texts_words(self, flag: str, part: str, weights: Mapping[str, float]) -> list[str]:
        """Return the words that give a command a part of each domain's text, with weights unless all are alike.

        Text to train or fit on bears the name of the source that it is for.
        """
        alike = len(set(weights.values())) == 1
        words = []
        for domain, weight in weights.items():
            name = "seed" if domain not in EXPERTS and part == "training" else domain
            text = shown(text_file(self.texts, domain, part))
            words += [flag, f"{name}={text}" if alike else f"{name}={text}:{weight:g}"]
        return words


def active_parameters(model: Path) -> int:
    """Return the parameters that one token meets: all of a dense model, the shared and K experts of a merged one."""
    if read_json(model / "config.json")["model_type"] == "btx":
        return info(str(model)).active_parameters
    from transformers import AutoModelForCausalLM

    return int(AutoModelForCausalLM.from_pretrained(model).num_parameters())
