"""Time the fit of a head of its own (`btx merge --head fitted`) for a real vocabulary, on made-up sources and moments.

    python benchmarks/head.py --vocabulary 128000 --hidden 2048 --domains 3

Prints seconds, CPU seconds, the peak memory of the process that fits, and what bins lose: of how far rows that are
solved each with a matrix of its own fall below the mean in what is minimised, the part by which those in bins do not.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import tempfile
from pathlib import Path

import bench
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from btx_merge.architectures.llama import EMBEDDING, HEAD
from btx_merge.fitting import head
from btx_merge.fitting.checkpoint import Checkpoint
from btx_merge.fitting.dense_source import DenseSource
from btx_merge.reporting import peak_memory, readable
from btx_merge.sources.locate import Located
from btx_merge.sources.segments import Segment
from btx_merge.sources.source import open_checkpoint

RIDGE, TOKENS = 0.01, 200_000
Moments = dict[str, torch.Tensor]


def made_up_source(folder: Path, shape: argparse.Namespace, number: int) -> torch.Tensor:
    """Write a tied Llama in bfloat16, without its layer, which no head needs. Returns its head."""
    rows, hidden = shape.vocabulary, shape.hidden
    config = LlamaConfig(
        vocab_size=rows, hidden_size=hidden, num_hidden_layers=1, tie_word_embeddings=True, dtype="bfloat16"
    )
    config.save_pretrained(folder)
    values = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(0))  # of all sources
    values += 0.3 * torch.randn(rows, hidden, generator=torch.Generator().manual_seed(number + 1))
    values = values.bfloat16()
    save_file({EMBEDDING: values}, folder / "model.safetensors")
    return values


def made_up_moments(hidden: int, names: list[str]) -> Moments:
    """Inputs of the head with a spectrum that falls, a part of it common to all domains."""
    moments: Moments = {}
    scale = torch.arange(1, hidden + 1).double().pow(-0.5)
    for number, name in enumerate(names):
        torch.manual_seed(number)
        turn = torch.linalg.qr(torch.eye(hidden).double() + 0.02 * torch.randn(hidden, hidden).double())[0]
        x = torch.randn(2 * hidden, hidden).double() * scale @ turn
        y = x + 0.3 * torch.randn(2 * hidden, hidden).double() * scale
        moments |= {f"gram.{name}": y.T @ y / len(y), f"cross.{name}": y.T @ x / len(y)}
    return moments


def made_up_counts(vocabulary: int, names: list[str]) -> Moments:
    """Tokens by Zipf's law, each domain with a liking of its own for every one of them."""
    counts = {}
    for number, name in enumerate(names):
        generator = torch.Generator().manual_seed(number)
        liking = torch.randn(vocabulary, generator=generator).mul(1.5).exp()
        frequency = liking / torch.arange(1, vocabulary + 1)
        drawn = torch.multinomial(frequency, TOKENS, replacement=True, generator=generator)
        counts[name] = torch.bincount(drawn, minlength=vocabulary).float()
    return counts


def lost_part(
    solved: torch.Tensor, rows: torch.Tensor, sources: dict[str, DenseSource], counts: Moments, moments: Moments
) -> float:
    """Return the part of the gain that rounding to bins loses, over some rows, as the module's docstring says."""
    smooth = {name: count.double() + 0.1 * count.sum() / len(count) for name, count in counts.items()}
    unit, gain, loss = torch.eye(solved.shape[1], dtype=torch.float64), 0.0, 0.0
    for row, found in zip(rows.tolist(), solved.double(), strict=True):
        frequency = sum(float(smooth[name][row]) for name in sources)
        left, right, mean = torch.zeros_like(unit), torch.zeros_like(found), torch.zeros_like(found)
        for name, source in sources.items():
            own = source.rows(HEAD, row, found[None].float())[0].double()
            share = float(smooth[name][row]) / frequency
            left += share * moments[f"gram.{name}"]
            right += share * moments[f"cross.{name}"] @ own
            mean += own / len(sources)
        penalty = RIDGE * left.diagonal().mean()
        left += penalty * unit
        exact = torch.linalg.solve(left, right + penalty * mean)
        # what is minimised is quadratic, so above its minimum it is this
        loss += frequency * float((found - exact) @ left @ (found - exact))
        gain += frequency * float((mean - exact) @ left @ (mean - exact))
    return loss / gain


def timed_fit(folder: Path, vocabulary: int, threads: int, rows: int) -> None:
    """Fit the head of what lies in the folder and print what that cost."""
    if threads:
        torch.set_num_threads(threads)
    place, whole = torch.device("cpu"), [Segment(0, 0, vocabulary)]
    counts, moments = load_file(folder / "counts.safetensors"), load_file(folder / "moments.safetensors")
    opened = {name: open_checkpoint(name, Located(folder / name), 1.0) for name in counts}
    sources = {name: DenseSource(source, whole, place) for name, source in opened.items()}
    checkpoint = Checkpoint(folder / "result", place)
    _, cost = bench.timed(lambda: head.fit_head_by_frequency(checkpoint, sources, counts, moments, RIDGE), "cpu")
    print(f"{cost.wall:.1f} s, {cost.cpu:.1f} s of CPU")
    print(f"peak memory: {readable(peak_memory())}, torch and transformers included")
    some = torch.unique(torch.logspace(0, math.log10(vocabulary), rows).long().clamp(max=vocabulary - 1))
    solved = torch.cat([checkpoint.read(HEAD, row, row + 1) for row in some.tolist()])
    lost = lost_part(solved, some, sources, counts, moments)
    print(f"lost to bins: {lost:.2%} of what {len(some)} rows gain")


def main() -> int:
    parser = bench.parser_of(__doc__, {"vocabulary": 128_000, "hidden": 2048, "domains": 3})
    parser.add_argument("--threads", type=int, default=0, help="[torch's own]")
    parser.add_argument("--rows", type=int, default=20, help="that are solved by themselves, too")
    options = parser.parse_args()
    names = [f"domain{number}" for number in range(options.domains)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        heads = [made_up_source(folder / name, options, number) for number, name in enumerate(names)]
        (folder / "result").mkdir()
        mean = heads[0].float()
        for other in heads[1:]:
            mean += other
        save_file({HEAD: (mean / len(heads)).bfloat16()}, folder / "result" / "model.safetensors")
        counts = made_up_counts(options.vocabulary, names)
        save_file(counts, folder / "counts.safetensors")
        save_file(made_up_moments(options.hidden, names), folder / "moments.safetensors")
        bins = len(head.share_bins(torch.stack([*counts.values()], dim=1).double())[1])
        print(f"{options.vocabulary:,} rows of {options.hidden:,}, {options.domains} domains, {bins} bins", flush=True)
        del heads, mean
        arguments = (folder, options.vocabulary, options.threads, options.rows)
        process = multiprocessing.get_context("spawn").Process(target=timed_fit, args=arguments)
        process.start()
        process.join()
    return process.exitcode or 0


if __name__ == "__main__":
    sys.exit(main())
