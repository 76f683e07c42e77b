"""The walk of a fit, beside the forward passes that it needs.

    python benchmarks/fit_walk.py                     4 experts of 8 layers, hidden size 512, float32
    python benchmarks/fit_walk.py --hidden-size 192 --intermediate-size 512 --num-hidden-layers 4    a small one
    python benchmarks/fit_walk.py --device cuda --dtype bfloat16 --hidden-size 2048 --intermediate-size 5632

What is measured: the walk from the embedding to the head, checkpoints read from the disk and weights written to it.
Beside it: the same windows through transformers' models, which are loaded before the clock starts, without heads. For
the fit of the routers that is the merged model; for that of shared weights as well it is the merged model, and each
domain's own source on that domain's windows. Both take their rounds in turns, and the ratio is taken round by round:
of CPU seconds on a CPU with one thread, otherwise of wall seconds. `--dtype` is that of the checkpoints. The models
are made at random, so nothing is said of what a fit is worth.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bench
import torch
import transformers
from btx_merge.modeling import BTXConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from btx_merge import DomainText, MergeRecipe, merge
from btx_merge.fitting.checkpoint import Checkpoint
from btx_merge.fitting.dense_source import DenseSource
from btx_merge.fitting.equations import Statistics
from btx_merge.fitting.recipe import TEXT_ROUTERS, FitTask
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
    config = LlamaConfig(**bench.shape_of(options, SHAPE), bos_token_id=0, eos_token_id=0, tie_word_embeddings=True)
    seed: Any = LlamaForCausalLM(config)
    for number, name in enumerate(["seed", *names]):
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in seed.parameters():
                parameter.add_(0.005 * torch.randn_like(parameter))
        seed.to(getattr(torch, options.dtype)).save_pretrained(folder / name)
        seed.float()
        bench.word_tokenizer(options.vocab_size).save_pretrained(folder / name)


def made_up_texts(folder: Path, names: Sequence[str], options: argparse.Namespace) -> dict[str, DomainText]:
    """Write a text for each domain, of documents with 20 to 600 words, each domain with a part of the vocabulary."""
    texts, part = {}, options.vocab_size // len(names)
    for number, name in enumerate(names):
        rng, lengths = random.Random(number), [600]
        while sum(lengths) < options.tokens + 600:
            lengths.append(rng.randint(20, 600))
        bench.write_text(folder / f"{name}.jsonl", lengths, range(number * part, (number + 1) * part))
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

    def forward_passes(self) -> bench.Cost:
        """Time every domain's way through the merged model, and through its source where shared weights are fitted."""
        streams = self.streams()

        def passes() -> None:
            for stream in streams:
                forward(self.models["merged"], stream, self.options.batch_size)
                if stream.name in self.opened:
                    forward(self.models[stream.name], stream, self.options.batch_size)

        return bench.timed(passes, self.options.device)[1]

    def walk(self) -> bench.Cost:
        """Time a fit of a copy of the merged model."""
        streams, whole = self.streams(), [Segment(0, 0, self.options.vocab_size)]
        with TemporaryDirectory(dir=self.folder) as copy:
            work = Path(shutil.copytree(self.merged, Path(copy) / "work"))

            def fit() -> None:
                dense = {name: DenseSource(source, whole, self.device) for name, source in self.opened.items()}
                checkpoint = Checkpoint(work, self.device)
                Walk(checkpoint, self.config, streams, Statistics(None, {}), self.task, dense).run(Reporter())

            return bench.timed(fit, self.options.device)[1]


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
    through = {
        "texts": texts,
        "prompts": {},
        "domain_tokens": options.tokens,
        "router": options.router,
        "through": "router",
    }
    every: Any = {**through, "combine": "regmean_merged", "head": "fitted", "averaged": options.experts + 1}
    routers: Any = through
    return {
        ROUTERS: Fit(folder, FitTask(**routers), False, options),
        ALL: Fit(folder, FitTask(**every), True, options),
    }


def main() -> None:
    parser = bench.parser_of(__doc__, SHAPE | RUN)
    parser.add_argument("--router", default="logistic", choices=TEXT_ROUTERS, help="how routers are fitted [logistic]")
    parser.add_argument("--busy", type=int, default=0, help="other programs that keep a core busy meanwhile")
    options = bench.parse(parser)
    quiet: Any = transformers.logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    rows = []
    with TemporaryDirectory() as folder, busy(options.busy):
        for name, fit in fits(Path(folder), options).items():
            costs = bench.in_turns({"passes": fit.forward_passes, "walk": fit.walk}, options.rounds)
            walk, passes = costs["walk"], costs["passes"]
            figures = [bench.times(passes, options), bench.times(walk, options), bench.ratios(walk, passes, options)]
            rows.append([name, *map(bench.spread, figures)])
    print(bench.facts(options, texts=f"{options.experts:,} x {options.tokens:,} tokens"), end="")
    print(bench.table(["fitted", "forward passes, s", "walk, s", "walk / forward passes"], rows), end="")
    print(f"goal: at most {GOAL}")


if __name__ == "__main__":
    main()
