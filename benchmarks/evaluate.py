"""Tokens per second of an evaluation, beside a plain forward loop of transformers over the same documents.

    python benchmarks/evaluate.py                     148 M parameters, 4 experts, float32, up to 700 tokens a document
    python benchmarks/evaluate.py --device cuda --dtype bfloat16 --hidden-size 2048 --intermediate-size 5632

What is measured: `btx eval`'s way from text to losses (tokens counted in a first pass, windows, batches, losses in
float32), with the model in memory. Beside it: each batch of documents as the tokenizer pads it, in the order of the
text, the model's logits, `cross_entropy`; what anybody would write. Both read the same tokens, take their rounds in
turns, and must find the same loss. The ratio is taken round by round.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from btx_merge.modeling import BTXConfig, BTXForCausalLM
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from btx_merge import DomainText
from btx_merge.evaluation.scoring import Domain, score

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
RUN = {"documents": 48, "longest": 700, "window": 1024, "batch_size": 4, "rounds": 5, "threads": 1}
GOAL = 0.9


def word_tokenizer(size: int) -> Any:
    """A token for each of the words w0, w1, ..., and one with which texts begin."""
    vocabulary = {f"w{number}": number for number in range(size - 1)} | {"<s>": size - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=tokenizer, bos_token="<s>", pad_token="w0")


@torch.inference_mode()
def plain_loop(model: Any, tokenizer: Any, texts: list[str], batch_size: int) -> float:
    """The loss of all tokens, in nats."""
    loss = 0.0
    for start in range(0, len(texts), batch_size):
        batch = [f"<s> {text}" for text in texts[start : start + batch_size]]
        inputs = tokenizer(batch, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1].float()
        targets = inputs["input_ids"][:, 1:].masked_fill(inputs["attention_mask"][:, 1:] == 0, -100)
        loss += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"))
    return loss


def timed(work: Callable[[], float]) -> tuple[float, float, float]:
    """The loss, wall seconds, CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    loss = work()  # ends with a number on the CPU, so a GPU is done
    return loss, time.perf_counter() - wall, time.process_time() - cpu


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (SHAPE | RUN).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"{default}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model: Any = BTXForCausalLM(BTXConfig(**{name: getattr(options, name) for name in SHAPE}, use_cache=False))
    model = model.to(options.device, getattr(torch, options.dtype)).eval()
    tokenizer, rng = word_tokenizer(options.vocab_size), random.Random(0)
    lengths = [rng.randint(1, options.longest) for _ in range(options.documents)]
    texts = [" ".join(f"w{rng.randrange(options.vocab_size - 1)}" for _ in range(length)) for length in lengths]
    tokens = sum(lengths)

    def ours() -> float:
        domain = Domain.counted(DomainText("text", (str(file),)), tokenizer, options.window, None)
        found = score(model, domain, tokenizer, options.batch_size * options.window, lambda nbytes: None)
        return math.log(found.perplexity) * tokens

    seconds: dict[str, list[tuple[float, float]]] = {"plain loop": [], "btx eval": []}
    ways = {"plain loop": lambda: plain_loop(model, tokenizer, texts, options.batch_size), "btx eval": ours}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "text.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        for number in range(-1, options.rounds):  # the first is to warm up
            losses = {}
            for name in list(ways)[:: -1 if number % 2 else 1]:
                losses[name], *spent = timed(ways[name])
                if number >= 0:
                    seconds[name].append((spent[0], spent[1]))
            difference = abs(losses["btx eval"] / losses["plain loop"] - 1)
            if difference > (1e-4 if options.dtype == "float32" else 1e-2):
                sys.exit(f"the losses differ by {difference:.2%}: {losses}")

    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    print(f"- command: {shlex.join(['python', *sys.argv])}")
    print(f"- device: {device}, {options.threads} threads, {options.dtype}; {tokens:,} tokens")
    print(f"- versions: torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| | tokens per wall second | CPU s | its tokens per second / the plain loop's |")
    print("|---|---|---|---|")
    clock = 1 if options.device == "cpu" and options.threads == 1 else 0
    for name, own in seconds.items():
        rates = [tokens / wall for wall, _ in own]
        ratios = [theirs[clock] / mine[clock] for mine, theirs in zip(own, seconds["plain loop"], strict=True)]
        print(f"| {name} | {spread(rates, 0)} | {spread([cpu for _, cpu in own])} | {spread(ratios)} |")
    print(f"\ngoal: at least {GOAL}")


if __name__ == "__main__":
    main()
