"""The steps of `btx train`, beside a bare loop over the same windows.

    python benchmarks/train_loop.py                   148 M parameters, 4 experts, float32, 512 tokens a step
    python benchmarks/train_loop.py --device cuda --dtype bfloat16 --hidden-size 2048 --intermediate-size 5632

The bare loop is forward and backward pass, clipping, AdamW. `btx train` takes the same steps with its defaults: a line
every ten steps with losses by domain and the load of experts, and checkpoints. Both train the shared weights, take
their rounds in turns, and must find the same loss. The ratio is one of seconds per step, without the first step of
each: of CPU seconds on a CPU with one thread, otherwise of wall seconds. What `btx train` needs before, between and
after its steps is listed below.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bench
import torch
from btx_merge.modeling import BTXConfig, BTXForCausalLM
from transformers import AutoTokenizer

from btx_merge import DomainText, TrainRecipe, train
from btx_merge.finetuning.data import DomainStream, MixedWindows, collate
from btx_merge.reporting import Reporter

RUN = {"batch_size": 1, "sequence_length": 512, "steps": 11, "rounds": 3, "threads": 1}
GOAL = 1.1
LOGGED = 10
"""Steps between two lines of losses, as `btx train` has it; the mean loss of the first is compared."""
RATE = 1e-4
SETTINGS = {"learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0}


class Times(Reporter):
    """Notes the time after each step."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[bench.Cost] = []

    def step_done(self, done: int, of: int) -> None:
        """Take the time."""
        self.marks.append(bench.now(self.device))

    def mean(self) -> bench.Cost:
        """Return what a step took in the mean, without the first."""
        _, *steps = itertools.starmap(bench.between, itertools.pairwise(self.marks))
        return bench.Cost(sum(step.wall for step in steps) / len(steps), sum(step.cpu for step in steps) / len(steps))


def made_up_model(folder: Path, options: argparse.Namespace) -> DomainText:
    """Write a model, a tokenizer with one token a word, and a text of random words."""
    torch.manual_seed(0)
    config = BTXConfig(**bench.shape_of(options, bench.BTX_SHAPE), max_position_embeddings=4096)
    model: Any = BTXForCausalLM(config)
    model.to(getattr(torch, options.dtype)).save_pretrained(folder / "model")
    bench.word_tokenizer(options.vocab_size).save_pretrained(folder / "model")
    file, documents = folder / "text.jsonl", 2 * options.batch_size * options.steps
    bench.write_text(file, [options.sequence_length] * documents, range(options.vocab_size))
    return DomainText("text", (str(file),))


def bare_loop(folder: Path, recipe: TrainRecipe, options: argparse.Namespace) -> tuple[float, bench.Cost]:
    """Return the mean loss of the first steps, which `btx train` reports together, and the mean cost of a step."""
    model: Any = BTXForCausalLM.from_pretrained(folder / "model", dtype="auto", use_cache=False)
    model = model.to(options.device).train()
    model.config.router_aux_loss_scope = recipe.router_aux_loss_scope
    trained = bench.trained_parameters(model, recipe.train)
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    stream = DomainStream(recipe.data[0], tokenizer, options.sequence_length, recipe.holdout)
    windows = iter(MixedWindows([stream], recipe.shuffle, 0))
    clock, losses = Times(options.device), []
    clock.step_done(0, options.steps)
    for number in range(options.steps):
        batch = collate([next(windows) for _ in range(options.batch_size)])
        batch = {name: tensor.to(options.device) for name, tensor in batch.items() if name != "domain"}
        losses.append(bench.training_step(model, batch, optimizer, options))
        clock.step_done(number + 1, options.steps)
    return float(sum(losses[:LOGGED]) / LOGGED), clock.mean()


def btx_train(
    folder: Path, recipe: TrainRecipe, parts: list[Mapping[str, float]], options: argparse.Namespace
) -> tuple[float, bench.Cost]:
    """Return the same of `btx train`, and add to `parts` what its time went into."""
    clock = Times(options.device)
    report = train(recipe, folder / f"out{len(parts)}", reporter=clock)
    parts.append(report.parts)
    return next(entry["loss"] for entry in report.history if "loss" in entry), clock.mean()


def main() -> None:
    options = bench.parse(bench.parser_of(__doc__, bench.BTX_SHAPE | RUN))
    parts: list[Mapping[str, float]] = []
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = made_up_model(folder, options)
        arguments = {**SETTINGS, "max_steps": options.steps, "per_device_train_batch_size": options.batch_size}
        arguments |= {"use_cpu": options.device == "cpu", "bf16": options.dtype == "bfloat16", "report_to": "none"}
        recipe = TrainRecipe(str(folder / "model"), (text,), max_length=options.sequence_length, arguments=arguments)
        ways = {
            "bare loop": lambda: bare_loop(folder, recipe, options),
            "btx train": lambda: btx_train(folder, recipe, parts, options),
        }
        found = bench.in_turns(ways, options.rounds, warm_up=False)  # the first step of each run is left out
    bench.check_alike({name: [loss for loss, _ in runs] for name, runs in found.items()}, options.dtype)
    costs = {name: [cost for _, cost in runs] for name, runs in found.items()}
    rows = []
    for name, own in costs.items():
        figures = bench.times(own, options), bench.ratios(own, costs["bare loop"], options)
        rows.append([name, *map(bench.spread, figures)])
    print(bench.facts(options), end="")
    print(bench.table(["", "s a step", "its time / the bare loop's"], rows), end="")
    print("wall seconds of the runs of `btx train`:")
    for part in parts[0]:
        print(f"- {part}: {bench.spread([run[part] for run in parts])}")
    print(f"\ngoal: at most {GOAL}")


if __name__ == "__main__":
    main()
