"""The steps of `btx train`, beside a bare loop over the same windows.

    python benchmarks/train_loop.py                   148 M parameters, 4 experts, float32, 512 tokens a step
    python benchmarks/train_loop.py --device cuda --dtype bfloat16 --hidden-size 2048 --intermediate-size 5632

The bare loop is forward and backward pass, clipping, AdamW. `btx train` takes the same steps with its defaults: a line
every ten steps with losses by domain and the load of experts, and checkpoints. Both train the shared weights, take
their rounds in turns, and must find the same loss. The ratio is one of CPU seconds per step on a CPU, of wall seconds
on a GPU, without the first step of each. What `btx train` needs before, between and after its steps is listed below.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from btx_merge.modeling import BTXConfig, BTXForCausalLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from btx_merge import DomainText, TrainRecipe, train
from btx_merge.finetuning.data import DomainStream, MixedWindows, collate
from btx_merge.finetuning.trainee_btx import is_trained
from btx_merge.reporting import Reporter

SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 16384,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
RUN = {"batch_size": 1, "sequence_length": 512, "steps": 11, "rounds": 3, "threads": 1}
GOAL = 1.1
LOGGED = 10
"""Steps between two lines of losses, as `btx train` has it; the mean loss of the first is compared."""
RATE = 1e-4
SETTINGS = {"learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0}
Step = tuple[float, float]
"""Wall seconds and CPU seconds."""


class Times(Reporter):
    """Notes the time after each step."""

    def __init__(self) -> None:
        self.marks: list[Step] = []

    def step_done(self, done: int, of: int) -> None:
        """Take the time; of a GPU when it has done its work."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time()))

    def steps(self) -> list[Step]:
        """Return what each step took, without the first."""
        pairs = [*itertools.pairwise(self.marks)][1:]
        return [(after[0] - before[0], after[1] - before[1]) for before, after in pairs]


def made_up_model(folder: Path, options: argparse.Namespace) -> DomainText:
    """Write a model, a tokenizer with one token a word, and a text of random words."""
    torch.manual_seed(0)
    config = BTXConfig(**{name: getattr(options, name) for name in SHAPE}, max_position_embeddings=4096)
    model: Any = BTXForCausalLM(config)
    model.to(getattr(torch, options.dtype)).save_pretrained(folder / "model")
    tokens = {f"w{number}": number for number in range(options.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made: Any = PreTrainedTokenizerFast
    made(tokenizer_object=tokenizer, bos_token="w0", eos_token="w0").save_pretrained(folder / "model")
    rng = random.Random(0)
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(2 * options.batch_size * options.steps):
            words = [f"w{rng.randrange(options.vocab_size)}" for _ in range(options.sequence_length)]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return DomainText("text", (str(folder / "text.jsonl"),))


def bare_loop(folder: Path, recipe: TrainRecipe, options: argparse.Namespace) -> tuple[list[Step], float]:
    """Return the steps, and the mean loss of the first that `btx train` reports together."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    model: Any = BTXForCausalLM.from_pretrained(folder / "model", dtype="auto", use_cache=False).to(device).train()
    model.config.router_aux_loss_scope = recipe.router_aux_loss_scope
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(recipe.train, name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    stream = DomainStream(recipe.data[0], tokenizer, options.sequence_length, recipe.holdout)
    windows = iter(MixedWindows([stream], recipe.shuffle, 0))
    times, losses = Times(), []
    times.step_done(0, options.steps)
    for number in range(options.steps):
        batch = collate([next(windows) for _ in range(options.batch_size)])
        batch = {name: tensor.to(device) for name, tensor in batch.items() if name != "domain"}
        with torch.autocast(options.device, dtype, enabled=dtype != torch.float32):
            loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.step_done(number + 1, options.steps)
    return times.steps(), float(sum(losses[:LOGGED]) / LOGGED)


def btx_train(folder: Path, recipe: TrainRecipe, parts: list[Mapping[str, float]]) -> tuple[list[Step], float]:
    """Return the same of `btx train`, and add to `parts` what its time went into."""
    times = Times()
    report = train(recipe, folder / f"out{len(parts)}", reporter=times)
    parts.append(report.parts)
    return times.steps(), next(entry["loss"] for entry in report.history if "loss" in entry)


def spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (SHAPE | RUN).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"{default}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = 0 if options.device == "cuda" else 1
    seconds: dict[str, list[float]] = {"bare loop": [], "btx train": []}
    parts: list[Mapping[str, float]] = []
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = made_up_model(folder, options)
        arguments = {**SETTINGS, "max_steps": options.steps, "per_device_train_batch_size": options.batch_size}
        arguments |= {"use_cpu": options.device == "cpu", "bf16": options.dtype == "bfloat16", "report_to": "none"}
        recipe = TrainRecipe(str(folder / "model"), (text,), max_length=options.sequence_length, arguments=arguments)

        ways = {
            "bare loop": lambda: bare_loop(folder, recipe, options),
            "btx train": lambda: btx_train(folder, recipe, parts),
        }
        for number in range(options.rounds):
            losses = {}
            for name in list(ways)[:: -1 if number % 2 else 1]:
                steps, losses[name] = ways[name]()
                seconds[name].append(sum(step[clock] for step in steps) / len(steps))
            difference = abs(losses["btx train"] / losses["bare loop"] - 1)
            if difference > (1e-4 if options.dtype == "float32" else 1e-2):
                sys.exit(f"the losses differ by {difference:.2%}: {losses}")
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    print(f"- command: {shlex.join(['python', *sys.argv])}")
    print(f"- device: {device}, {options.threads} threads, {options.dtype}")
    print(f"- versions: torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| | s a step | its time / the bare loop's |")
    print("|---|---|---|")
    for name, own in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(own, seconds["bare loop"], strict=True)]
        print(f"| {name} | {spread(own, 3)} | {spread(ratios)} |")
    print("\nwall seconds of the runs of `btx train`:")
    for part in parts[0]:
        print(f"- {part}: {spread([run[part] for run in parts], 1)}")
    print(f"\ngoal: at most {GOAL}")


if __name__ == "__main__":
    main()
