"""What benchmarks share: options, made-up texts, steps of training, costs that are taken in turns, and the report.

torch is imported by the functions that need it: no process that benchmarks/merge.py starts can show less memory than
benchmarks/merge.py itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

BTX_SHAPE = {  # 148 M parameters
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 16384,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


# ---- options


def parser_of(description: str | None, numbers: Mapping[str, int]) -> argparse.ArgumentParser:
    """Return a parser with an option for each of these whole numbers, with its default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"{default}")
    return parser


def parse(parser: argparse.ArgumentParser, *more_dtypes: str) -> argparse.Namespace:
    """Add the options that say what is computed with, parse all, and set the number of threads."""
    import torch

    parser.add_argument("--dtype", choices=("float32", "bfloat16", *more_dtypes), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def shape_of(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return the options with these names, as a config takes them."""
    return {name: getattr(options, name) for name in names}


# ---- what is read and trained


def word_tokenizer(size: int) -> Any:
    """Return a tokenizer with a token for each of the words w0, w1, ...; w0 begins, ends and pads texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=tokenizer, bos_token="w0", eos_token="w0", pad_token="w0")


def write_text(file: Path, lengths: Iterable[int], words: range) -> list[str]:
    """Write documents of random words, and return them.

    Args:
        lengths: of each document, in words.
        words: the numbers of those that are drawn from.
    """
    rng = random.Random(words.start)
    texts = [" ".join(f"w{rng.choice(words)}" for _ in range(length)) for length in lengths]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return texts


def trained_parameters(model: Any, part: str) -> list[torch.nn.Parameter]:
    """Freeze what `btx train --train PART` freezes; return the rest, which it holds in float32."""
    from btx_merge.finetuning.trainee_btx import is_trained

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(part, name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def training_step(
    model: Any, inputs: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, options: argparse.Namespace
) -> torch.Tensor:
    """Do forward and backward pass, clipping and the optimizer's step; return the loss."""
    import torch

    dtype = getattr(torch, options.dtype)
    with torch.autocast(options.device, dtype, enabled=dtype != torch.float32):
        loss: torch.Tensor = model(**inputs).loss
    torch.autograd.backward(loss)
    (group,) = optimizer.param_groups
    torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


# ---- costs


class Cost(NamedTuple):
    """What some work costs."""

    wall: float  # seconds
    cpu: float  # seconds of all threads
    peak: int = 0  # bytes on the GPU above those before; 0 on a CPU


def now(device: str) -> Cost:
    """Return the clocks; those of a GPU when it has done its work."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return Cost(time.perf_counter(), time.process_time())


def between(before: Cost, after: Cost) -> Cost:
    """Return what passed between two readings of the clocks."""
    return Cost(after.wall - before.wall, after.cpu - before.cpu)


def timed(work: Callable[[], T], device: str) -> tuple[T, Cost]:
    """Return what some work gives, and what it costs."""
    before = now(device)
    result = work()
    return result, between(before, now(device))


def in_turns(ways: Mapping[str, Callable[[], T]], rounds: int, warm_up: bool = True) -> dict[str, list[T]]:
    """Return what each way gives, round by round. The order is reversed every other round.

    Args:
        warm_up: whether there is a round more, before the others, of which nothing is returned.
    """
    found: dict[str, list[T]] = {name: [] for name in ways}
    for number in range(-1 if warm_up else 0, rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            result = ways[name]()
            if number >= 0:
                found[name].append(result)
    return found


def clock(options: argparse.Namespace) -> str:
    """Return which time ratios are taken of: CPU seconds of one thread, otherwise wall seconds."""
    return "cpu" if options.device == "cpu" and options.threads == 1 else "wall"


def times(costs: Sequence[Cost], options: argparse.Namespace) -> list[float]:
    """Return the seconds that ratios are taken of."""
    return [getattr(cost, clock(options)) for cost in costs]


def ratios(over: Sequence[Cost], under: Sequence[Cost], options: argparse.Namespace) -> list[float]:
    """Return the ratio of the times, round by round."""
    return [a / b for a, b in zip(times(over, options), times(under, options), strict=True)]


def check_alike(losses: Mapping[str, Sequence[float]], dtype: str) -> None:
    """End the benchmark if two ways do not find the same loss in each round: like is not compared with like then."""
    for found in zip(*losses.values(), strict=True):
        difference = max(found) / min(found) - 1
        if difference > (1e-4 if dtype == "float32" else 1e-2):
            sys.exit(f"the losses of {' and '.join(losses)} differ by {difference:.2%}: {found}")


# ---- the report


def spread(values: Sequence[float]) -> str:
    """Return the median, the smallest and the largest."""
    largest = max(map(abs, values))
    digits = 0 if largest >= 100 else 1 if largest >= 10 else 2 if largest >= 1 else 3
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, and an empty line."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n\n"


def cpu_name() -> str:
    """Return what the processor calls itself."""
    file = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", file.read_text()) if file.exists() else None
    return named[1] if named else platform.machine()


def listed(facts: Mapping[str, str]) -> str:
    """Return facts as a list in Markdown, and an empty line."""
    return "".join(f"- {name}: {value}\n" for name, value in facts.items()) + "\n"


def command() -> str:
    """Return the command that is running."""
    return shlex.join(["python", *sys.argv])


def facts(options: argparse.Namespace, **more: str) -> str:
    """Return what was measured with, as `listed` does."""
    import torch
    import transformers

    device = torch.cuda.get_device_name() if options.device == "cuda" else cpu_name()
    lines = {
        "command": command(),
        "device": f"{device}, {options.threads} threads, {options.dtype}",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "ratios of": f"{clock(options)} seconds",
    }
    return listed(lines | more)
