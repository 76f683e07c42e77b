"""What can be had without training: routers and shared weights fitted in closed form, beside what they must beat.

    make demo && python examples/compare.py                # the demo's checkpoints
    make demo-smollm2 && python examples/compare.py --demo demo/smollm2 --domain-tokens 25000

Merges the seed and the experts that a demo left behind in many ways, and scores each result, the seed, the experts
and a dense soup (the plain mean of all weights) on held-out text of every domain: bits per byte, and the part of the
distance from the seed to the oracle (the best single model per domain) that is closed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import demo_common as common
import torch
from demo_common import ROOT
from demo_texts import DOMAINS
from transformers import AutoModelForCausalLM, AutoTokenizer

from btx_merge import ExpertSpec, MergeRecipe, Options, merge

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
}
Bits = dict[str, float]


def soup(folders: list[Path], output: Path) -> Path:
    """The dense Llama whose every weight is the mean of all models'."""
    models = [dense(folder) for folder in folders]
    state = models[0].state_dict()
    for name in state:
        state[name] = sum(model.state_dict()[name] for model in models) / len(models)
    models[0].load_state_dict(state)
    models[0].save_pretrained(output)
    return output


def dense(folder: Path) -> Any:
    """A checkpoint in float32, an adapter merged into its base."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(folder.parent / "seed", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    return model


class Table:
    """Rows of bits per byte, printed as they come."""

    def __init__(self, seed: Bits, singles: list[Bits]):
        self.seed = seed
        self.oracle = {domain: min(bits[domain] for bits in singles) for domain in DOMAINS}
        print(f"| model | {' | '.join(DOMAINS)} | distance closed: {' / '.join(DOMAINS)} | mean |")
        print("|---|" + "---|" * (len(DOMAINS) + 2))

    def add(self, name: str, bits: Bits) -> None:
        closed = [(self.seed[d] - bits[d]) / (self.seed[d] - self.oracle[d]) for d in DOMAINS]
        cells = [f"{bits[d]:.3f}" for d in DOMAINS]
        share = " / ".join(f"{part:.0%}" for part in closed)
        print(f"| {name} | {' | '.join(cells)} | {share} | {sum(closed) / len(closed):.1%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="what a demo left behind")
    parser.add_argument("--domain-tokens", type=int, default=100_000)
    parser.add_argument("--half", type=int, choices=(0, 1), help="fit on every other document, from this one [on all]")
    parser.add_argument("--window", type=int, help="tokens of a window that is scored [128; for SmolLM2 256]")
    parser.add_argument("--heldout-chars", type=int, help="of each domain [all; for SmolLM2 24000]")
    parser.add_argument("--shared", nargs="*", default=list(SHARED), choices=list(SHARED))
    parser.add_argument("--routers", nargs="*", default=list(ROUTERS), choices=list(ROUTERS))
    parser.add_argument("--experts-per-token", nargs="*", type=int, default=[2])
    options = parser.parse_args()
    is_small = options.demo.name != "smollm2"
    window = options.window or (128 if is_small else 256)
    corpora = json.loads((ROOT / "demo" / "texts" / "corpora.json").read_text("utf-8"))
    limit = options.heldout_chars or (None if is_small else 24_000)
    texts = {domain: "\n\n\n".join(corpora[domain]["heldout"])[:limit] for domain in DOMAINS}
    tokenizer = AutoTokenizer.from_pretrained(options.demo / "seed")

    def bits(model: Any) -> Bits:
        return {d: common.score(model.eval(), tokenizer, text, window).bits_per_byte for d, text in texts.items()}

    with TemporaryDirectory(dir=options.demo) as scratch:
        folder = Path(scratch)
        for domain in DOMAINS:
            documents = corpora[domain]["train"]
            if options.half is not None:
                documents = documents[options.half :: 2]
            lines = (json.dumps({"text": text}) for text in documents)
            (folder / f"{domain}.jsonl").write_text("\n".join(lines), "utf-8")
        names = ("seed", *DOMAINS)
        singles = {name: bits(dense(options.demo / name)) for name in names}
        table = Table(singles["seed"], list(singles.values()))
        for name, found in singles.items():
            table.add(name, found)
        table.add("oracle", table.oracle)
        table.add("soup", bits(dense(soup([options.demo / name for name in names], folder / "soup"))))
        measure_merges(options, folder, bits, table)


def measure_merges(options: argparse.Namespace, folder: Path, bits: Callable[[Any], Bits], table: Table) -> None:
    """One row for each way to merge."""
    texts = {domain: [str(folder / f"{domain}.jsonl")] for domain in DOMAINS}
    for shared in options.shared:
        for router in options.routers:
            values: dict[str, Any] = {**SHARED[shared], **ROUTERS[router]}
            if values.get("router_init") == "ridge" or "regmean" in shared:
                values |= {"domain_text": texts, "domain_tokens": options.domain_tokens}
            elif "fit_through" in values:
                continue
            experts = {domain: ExpertSpec(str(options.demo / domain)) for domain in DOMAINS}
            began = time.perf_counter()
            merge(MergeRecipe(str(options.demo / "seed"), experts, **values), folder / "btx", Options(overwrite=True))
            seconds = time.perf_counter() - began
            for per_token in options.experts_per_token:
                model = AutoModelForCausalLM.from_pretrained(
                    folder / "btx", dtype=torch.float32, num_experts_per_tok=per_token
                )
                table.add(f"{shared} + {router}, top-{per_token} ({seconds:.0f} s)", bits(model))
            shutil.rmtree(folder / "btx")


if __name__ == "__main__":
    main()
