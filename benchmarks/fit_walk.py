"""The walk of a fit, beside the forward passes that it needs.

    python benchmarks/fit_walk.py                     4 experts of 8 layers, hidden size 512, float32
    python benchmarks/fit_walk.py --hidden-size 192 --intermediate-size 512 --num-hidden-layers 4    a small one
    python benchmarks/fit_walk.py --device cuda --dtype bfloat16 --hidden-size 2048 --intermediate-size 5632

What is measured: the walk from the embedding to the head, checkpoints read from the disk and weights written to it.
Beside it: the same windows through transformers' models, which are loaded before the clock starts, without heads. For
the fit of the routers that is the merged model; for that of shared weights as well it is the merged model, and each
domain's own source on that domain's windows. Both take their rounds in turns, and the ratio is taken round by round:
of CPU seconds on a CPU, of wall seconds on a GPU. The models are made at random, so nothing is said of what a fit is
worth.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from btx_merge.modeling import BTXConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from btx_merge import DomainText, MergeRecipe, merge
from btx_merge.fitting.checkpoint import Checkpoint
from btx_merge.fitting.dense_source import DenseSource
from btx_merge.fitting.equations import Statistics
from btx_merge.fitting.recipe import FitTask
from btx_merge.fitting.streams import TokenStream, streams_of
from btx_merge.fitting.walk import Walk
from btx_merge.reporting import Reporter
from btx_merge.sources.locate import Located
from btx_merge.sources.segments import Segment
from btx_merge.sources.source import open_checkpoint

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}
RUN = {"experts": 3, "tokens": 8192, "batch_size": 4, "rounds": 3, "threads": 1}
GOAL = 1.5
ROUTERS, ALL = "routers (`btx fit`)", "shared weights, head, routers (`btx merge`)"


def made_up_models(folder: Path, names: Sequence[str], options: argparse.Namespace) -> None:
    """Write a seed and the experts, which are the seed with noise, and a tokenizer with one token a word."""
    torch.manual_seed(0)
    shape = {name: getattr(options, name) for name in SHAPE}
    seed: Any = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True))
    tokens = {f"w{number}": number for number in range(options.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made: Any = PreTrainedTokenizerFast
    for number, name in enumerate(["seed", *names]):
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in seed.parameters():
                parameter.add_(0.005 * torch.randn_like(parameter))
        seed.to(getattr(torch, options.dtype)).save_pretrained(folder / name)
        seed.float()
        made(tokenizer_object=tokenizer, bos_token="w0", eos_token="w0").save_pretrained(folder / name)


def made_up_texts(folder: Path, names: Sequence[str], options: argparse.Namespace) -> dict[str, DomainText]:
    """Write a text for each domain, of documents with 20 to 600 words, each domain with a part of the vocabulary."""
    texts, part = {}, options.vocab_size // len(names)
    for number, name in enumerate(names):
        rng, left = random.Random(number), options.tokens + 600
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            while left > 0:
                words = [f"w{number * part + rng.randrange(part)}" for _ in range(rng.randint(20, 600))]
                file.write(json.dumps({"text": " ".join(words)}) + "\n")
                left -= len(words)
        texts[name] = DomainText(name, (str(folder / f"{name}.jsonl"),))
    return texts


@torch.inference_mode()
def forward(model: Any, stream: TokenStream, batch_size: int) -> None:
    """Send a domain's windows through a model without its head. Documents are kept apart, as transformers does it."""
    for start in range(0, len(stream.ids), batch_size):
        ids = stream.ids[start : start + batch_size].to(model.device)
        positions = stream.positions[start : start + batch_size].to(model.device)
        model.model(input_ids=ids, position_ids=positions, use_cache=False)


class Fit:
    """One way to fit, and the forward passes that it needs."""

    def __init__(self, folder: Path, task: FitTask, fits_shared: bool, options: argparse.Namespace):
        self.folder, self.task, self.options = folder, task, options
        self.device = torch.device(options.device)
        self.merged = folder / ("untied" if fits_shared else "tied")
        self.config = BTXConfig.from_pretrained(self.merged)
        names = list(task.texts) if fits_shared else []
        self.opened = {name: open_checkpoint(name, Located(folder / name), 1.0) for name in names}
        self.models = {name: self._loaded(folder / name) for name in ["merged", *names]}

    def _loaded(self, folder: Path) -> Any:
        """Load a model in float32, in which a fit computes."""
        source = self.merged if folder.name == "merged" else folder
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        return model.to(self.device).eval()

    def streams(self) -> list[TokenStream]:
        """Read the texts."""
        return streams_of(self.merged, self.config, self.task.texts, {}, self.task.domain_tokens)

    def forward_passes(self, streams: Sequence[TokenStream]) -> None:
        """Send every domain through the merged model, and through its own source where shared weights are fitted."""
        for stream in streams:
            forward(self.models["merged"], stream, self.options.batch_size)
            if stream.name in self.opened:
                forward(self.models[stream.name], stream, self.options.batch_size)

    def walk(self, streams: Sequence[TokenStream], work: Path) -> None:
        """Fit the checkpoint in the folder `work`."""
        whole = [Segment(0, 0, self.options.vocab_size)]
        dense = {name: DenseSource(source, whole, self.device) for name, source in self.opened.items()}
        checkpoint = Checkpoint(work, self.device)
        Walk(checkpoint, self.config, streams, Statistics(None, {}), self.task, dense).run(Reporter())

    def round(self, is_odd: bool) -> dict[str, tuple[float, float]]:
        """Time both, in one order or the other: wall seconds and CPU seconds."""
        spent, streams = {}, self.streams()
        with TemporaryDirectory(dir=self.folder) as copy:
            work = Path(shutil.copytree(self.merged, Path(copy) / "work"))
            ways = {"passes": lambda: self.forward_passes(streams), "walk": lambda: self.walk(streams, work)}
            for name in list(ways)[:: -1 if is_odd else 1]:
                spent[name] = self._timed(ways[name])
        return spent

    def _timed(self, work: Callable[[], None]) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu


@contextlib.contextmanager
def busy(programs: int) -> Iterator[None]:
    """Keep other programs busy meanwhile, each with a core of its own where there are enough."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def fits(folder: Path, options: argparse.Namespace) -> dict[str, Fit]:
    """Make models and texts, merge them, and prepare both ways to fit."""
    names = [f"domain{number}" for number in range(options.experts)]
    made_up_models(folder, names, options)
    texts = made_up_texts(folder, names, options)
    recipe: dict[str, Any] = {"experts": {name: str(folder / name) for name in names}, "allow_unrelated": True}
    given: dict[str, Any] = {"domain_text": texts, "domain_tokens": options.tokens}
    merge(MergeRecipe(str(folder / "seed"), **recipe), folder / "tied")
    # a fit of 64 tokens, for a checkpoint with a head of its own
    few = {**given, "domain_tokens": 64, "combine": "regmean", "head": "fitted"}
    merge(MergeRecipe(str(folder / "seed"), **recipe, **few), folder / "untied")
    through = {"texts": texts, "prompts": {}, "domain_tokens": options.tokens, "router": "ridge", "through": "router"}
    every: Any = {**through, "combine": "regmean_merged", "head": "fitted", "averaged": options.experts + 1}
    routers: Any = through
    return {
        ROUTERS: Fit(folder, FitTask(**routers), False, options),
        ALL: Fit(folder, FitTask(**every), True, options),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (SHAPE | RUN).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"{default}")
    parser.add_argument("--busy", type=int, default=0, help="other programs that keep a core busy meanwhile")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the checkpoints")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    quiet: Any = transformers.logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    torch.set_num_threads(options.threads)
    seconds: dict[str, list[dict[str, tuple[float, float]]]] = {ROUTERS: [], ALL: []}
    with TemporaryDirectory() as folder:
        prepared = fits(Path(folder), options)
        with busy(options.busy):
            for number in range(-1, options.rounds):  # the first is to warm up
                for name, fit in prepared.items():
                    spent = fit.round(is_odd=bool(number % 2))
                    if number >= 0:
                        seconds[name].append(spent)

    cuda = options.device == "cuda"
    device = torch.cuda.get_device_name() if cuda else platform.machine()
    print(f"- command: {shlex.join(['python', *sys.argv])}")
    print(f"- device: {device}, {options.threads} threads; {options.experts:,} x {options.tokens:,} tokens")
    print(f"- versions: torch {torch.__version__}, transformers {transformers.__version__}\n")
    clock = 0 if cuda else 1
    unit = "wall s" if cuda else "CPU s"
    print(f"| fitted | forward passes, {unit} | walk, {unit} | walk / forward passes |")
    print("|---|---|---|---|")
    for name, rounds in seconds.items():
        passes, walks = [r["passes"][clock] for r in rounds], [r["walk"][clock] for r in rounds]
        ratios = [walk / forward for walk, forward in zip(walks, passes, strict=True)]
        print(f"| {name} | {spread(passes, 1)} | {spread(walks, 1)} | {spread(ratios)} |")
    print(f"\ngoal: at most {GOAL}")


if __name__ == "__main__":
    main()
