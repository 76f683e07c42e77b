"""Tokens per second of an evaluation, beside a plain forward loop of transformers over the same documents.

    python benchmarks/evaluate.py                     148 M parameters, 4 experts, float32, up to 700 tokens a document
    python benchmarks/evaluate.py --device cuda --dtype bfloat16 --hidden-size 2048 --intermediate-size 5632

What is measured: `btx eval`'s way from text to losses (tokens counted in a first pass, windows, batches, losses in
float32), with the model in memory. Beside it: each batch of documents as the tokenizer pads it, in the order of the
text, the model's logits, `cross_entropy`; what anybody would write. Both read the same tokens, take their rounds in
turns, and must find the same loss. The ratio is taken round by round.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bench
import torch
from btx_merge.modeling import BTXConfig, BTXForCausalLM
from torch.nn import functional as F

from btx_merge import DomainText
from btx_merge.evaluation.scoring import score
from btx_merge.measuring.windows import Domain

RUN = {"documents": 48, "longest": 700, "window": 1024, "batch_size": 4, "rounds": 5, "threads": 1}
GOAL = 0.9


@torch.inference_mode()
def plain_loop(model: Any, tokenizer: Any, texts: list[str], batch_size: int) -> float:
    """The loss of all tokens, in nats."""
    loss = 0.0
    for start in range(0, len(texts), batch_size):
        batch = [f"{tokenizer.bos_token} {text}" for text in texts[start : start + batch_size]]
        inputs = tokenizer(batch, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1].float()
        targets = inputs["input_ids"][:, 1:].masked_fill(inputs["attention_mask"][:, 1:] == 0, -100)
        loss += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"))
    return loss


def main() -> None:
    options = bench.parse(bench.parser_of(__doc__, bench.BTX_SHAPE | RUN))
    torch.manual_seed(0)
    model: Any = BTXForCausalLM(BTXConfig(**bench.shape_of(options, bench.BTX_SHAPE), use_cache=False))
    model = model.to(options.device, getattr(torch, options.dtype)).eval()
    tokenizer, rng = bench.word_tokenizer(options.vocab_size), random.Random(0)
    lengths = [rng.randint(1, options.longest) for _ in range(options.documents)]
    tokens = sum(lengths)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "text.jsonl"
        texts = bench.write_text(file, lengths, range(options.vocab_size))

        def theirs() -> float:
            return plain_loop(model, tokenizer, texts, options.batch_size)

        def ours() -> float:
            domain = Domain.counted(DomainText("text", (str(file),)), tokenizer, options.window, None)
            found = score(model, domain, tokenizer, options.batch_size * options.window, lambda nbytes: None)
            return math.log(found.perplexity) * tokens

        ways = {
            "plain loop": lambda: bench.timed(theirs, options.device),
            "btx eval": lambda: bench.timed(ours, options.device),
        }
        found = bench.in_turns(ways, options.rounds)
    bench.check_alike({name: [loss for loss, _ in rounds] for name, rounds in found.items()}, options.dtype)
    costs = {name: [cost for _, cost in rounds] for name, rounds in found.items()}
    rows = []
    for name, own in costs.items():
        rates, cpu = [tokens / cost.wall for cost in own], [cost.cpu for cost in own]
        compared = bench.ratios(costs["plain loop"], own, options)
        rows.append([name, bench.spread(rates), bench.spread(cpu), bench.spread(compared)])
    print(bench.facts(options, text=f"{tokens:,} tokens"), end="")
    head = ["", "tokens per wall second", "CPU s", "its tokens per second / the plain loop's"]
    print(bench.table(head, rows) + f"goal: at least {GOAL}")


if __name__ == "__main__":
    main()
