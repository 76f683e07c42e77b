"""What can be had without training: routers and shared weights fitted on text, beside what they must beat.

    make demo && python examples/compare.py                # the demo's checkpoints
    make demo-smollm2 && python examples/compare.py --demo demo/smollm2 --domain-tokens 12000 --tokens 6000
    python examples/compare.py --shared mean --routers prompts --mergekit VENV    # beside mergekit-moe, from there

Merges the seed and the experts that a demo left behind in many ways, and measures each result on held-out text of
every domain as `btx eval` does: bits per byte, and the fraction of the gap between the seed and the best single model
that is closed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from demo_common import held_out, one_at_a_time, training
from demo_texts import DOMAINS
from peft import AutoPeftModelForCausalLM

from btx_merge import DomainText, EvalRecipe, EvalReport, ExpertSpec, MergeRecipe, Options, evaluate, merge
from btx_merge.evaluation.report import Row

PROMPTS = {
    "code": ["def main(argv=None):", "    return self._value", "import os", "for index, item in enumerate(items):"],
    "english": ["The function returns the value of", "This module defines classes which", "For example, if the"],
    "math": ["Returns the derivative of the expression.", ">>> from sympy import symbols", "x**2 + 2*x + 1"],
}
SHARED: dict[str, dict[str, Any]] = {
    "mean": {},
    "fold_norms": {"fold_norms": True},
    "ties": {"combine": "ties"},
    "ties, scale 0.5": {"combine": "ties", "scale": 0.5},
    "dare_ties": {"combine": "dare_ties"},
    "dare_linear": {"combine": "dare_linear"},
    "regmean": {"combine": "regmean"},
    "regmean_merged": {"combine": "regmean_merged"},
    "regmean_merged, head": {"combine": "regmean_merged", "head": "fitted"},
}
ROUTERS: dict[str, dict[str, Any]] = {
    "random": {},
    "prompts": {"router_init": "prompts", "prompts": PROMPTS},
    "ridge": {"router_init": "ridge"},
    "ridge, through router": {"router_init": "ridge", "fit_through": "router"},
    "logistic, through router": {"router_init": "logistic", "fit_through": "router"},
}


@dataclass(frozen=True)
class Comparison:
    """Merges of one set of sources, measured on the same texts."""

    demo: Path
    domain_tokens: int
    window: int
    tokens: int | None
    texts: Mapping[str, Path]
    """What fits read, by domain."""

    def merge(self, shared: str, router: str, output: Path) -> None:
        """Merge the demo's models in one of the ways."""
        values: dict[str, Any] = {**SHARED[shared], **ROUTERS[router]}
        if values.get("router_init") in ("ridge", "logistic") or "regmean" in shared:
            texts = {domain: str(file) for domain, file in self.texts.items()}
            values |= {"domain_text": texts, "domain_tokens": self.domain_tokens}
        experts = {domain: ExpertSpec(str(self.demo / domain)) for domain in DOMAINS}
        merge(MergeRecipe(str(self.demo / "seed"), experts, **values), output, Options(overwrite=True))

    def merge_with_mergekit(self, environment: Path, output: Path) -> None:
        """Have mergekit-moe merge the same models: shared weights of the seed, routers from the same prompts."""
        prompts = {"seed": [prompt for own in PROMPTS.values() for prompt in own], **PROMPTS}
        sources = {name: whole(self.demo / name, output.parent) for name in prompts}
        experts = [{"source_model": str(sources[name]), "positive_prompts": own} for name, own in prompts.items()]
        recipe = {"base_model": str(sources["seed"]), "gate_mode": "hidden", "dtype": "float32", "experts": experts}
        file = output.with_name("mergekit.yaml")
        file.write_text(json.dumps(recipe), "utf-8")  # JSON is YAML
        shutil.rmtree(output, ignore_errors=True)
        subprocess.run([environment / "bin" / "mergekit-moe", file, output, "--quiet"], check=True)

    def measure(self, model: Path, **beside: Any) -> EvalReport:
        """Measure a merge on all held-out texts."""
        texts = tuple(DomainText(domain, (str(held_out(domain)),)) for domain in DOMAINS)
        return evaluate(EvalRecipe(str(model), texts, window=self.window, tokens=self.tokens, **beside))


def whole(model: Path, folder: Path) -> Path:
    """Write an adapter, merged into its base, into a folder; take a checkpoint as it is."""
    if not (model / "adapter_config.json").exists():
        return model
    merged: Any = AutoPeftModelForCausalLM.from_pretrained(model)
    merged.merge_and_unload().save_pretrained(folder / model.name)
    return folder / model.name


def part_of(file: Path, half: int | None, folder: Path) -> Path:
    """Write every other document of a file, from document `half` on, into a folder; without a half, take the file."""
    if half is None:
        return file
    (folder / file.name).write_text("".join(file.read_text("utf-8").splitlines(keepends=True)[half::2]), "utf-8")
    return folder / file.name


def bits_of(row: Row) -> dict[str, float]:
    """Return a row's bits per byte by domain."""
    return {domain: score.bits_per_byte for domain, score in row.scores.items()}


def print_row(name: str, bits: Mapping[str, float], closed: Mapping[str, float | None]) -> None:
    """Print a line of the table."""
    parts = [part for part in closed.values() if part is not None]
    cells = [f"{bits[domain]:.3f}" for domain in DOMAINS]
    shares = " / ".join("no gap" if part is None else f"{part:.0%}" for part in closed.values())
    print(f"| {name} | {' | '.join(cells)} | {shares} | {sum(parts) / max(1, len(parts)):.1%} |", flush=True)


@one_at_a_time()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="what a demo left behind")
    parser.add_argument("--domain-tokens", type=int, default=100_000, help="of each domain that a fit reads")
    parser.add_argument("--half", type=int, choices=(0, 1), help="fit on every other document, from this one [on all]")
    parser.add_argument("--window", type=int, help="tokens of a window that is scored [127; for SmolLM2 255]")
    parser.add_argument("--tokens", type=int, help="of each domain that are scored [all]")
    parser.add_argument("--shared", nargs="*", default=list(SHARED), choices=list(SHARED))
    parser.add_argument("--routers", nargs="*", default=list(ROUTERS), choices=list(ROUTERS))
    parser.add_argument("--mergekit", type=Path, metavar="VENV", help="virtual environment with mergekit")
    options = parser.parse_args()
    window = options.window or (255 if options.demo.name == "smollm2" else 127)
    with TemporaryDirectory(dir=options.demo) as scratch:
        texts = {domain: part_of(training(domain), options.half, Path(scratch)) for domain in DOMAINS}
        comparison = Comparison(options.demo, options.domain_tokens, window, options.tokens, texts)
        print(f"| model | {' | '.join(DOMAINS)} | gap closed: {' / '.join(DOMAINS)} | mean |")
        print("|---|" + "---|" * (len(DOMAINS) + 2))
        report = comparison.measure(options.demo / "btx", soup=True)
        for row in report.rows[1:]:  # the first is a merge, and comes again
            print_row(row.name, bits_of(row), row.closed)
        seed = bits_of(next(row for row in report.rows if row.name == "seed"))
        oracle = {domain: best.bits_per_byte for domain, best in report.oracle.items()}

        def print_merge(name: str, merge_into: Callable[[Path], None]) -> None:
            output, began = Path(scratch) / "btx", time.perf_counter()
            merge_into(output)
            seconds = time.perf_counter() - began
            bits = bits_of(comparison.measure(output, no_sources=True).rows[0])
            closed = {d: (seed[d] - bits[d]) / (seed[d] - oracle[d]) if seed[d] > oracle[d] else None for d in DOMAINS}
            print_row(f"{name} ({seconds:.0f} s)", bits, closed)

        for shared, router in itertools.product(options.shared, options.routers):
            if "fit_through" in ROUTERS[router] and "regmean" not in shared and shared != "mean":
                continue  # nothing is known of it that the plain mean does not show
            print_merge(f"{shared} + {router}", partial(comparison.merge, shared, router))
        if options.mergekit:
            print_merge("mergekit-moe", partial(comparison.merge_with_mergekit, options.mergekit))


if __name__ == "__main__":
    main()
