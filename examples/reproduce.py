"""The comparison of Branch-Train-MiX (arXiv 2403.07816), rerun in small on real text with the commands of `btx`.

    make reproduce                              # an hour or more on two cores; a run that was stopped goes on
    python examples/reproduce.py --quick        # one seed, few steps: shows that it runs, not what is better

Every random seed is a process of its own with one thread, and all run side by side.
Everything is kept under `demo/reproduction/`, the figures too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from demo import WINDOW
from demo_common import one_at_a_time
from reproduce_rates import try_rates
from reproduce_run import BATCH, STEP_TOKENS, Row, Run, Scale, Study, active_parameters
from reproduce_tables import rates_table, tables
from reproduce_texts import EXPERTS, text_file, write_texts
from steps import ROOT, console, shown, stopwatch

import btx_merge
from btx_merge.files.folder import read_json, write_json

FULL = Scale(seed_steps=2000, branch_steps=250, finetuning_steps=150, runs=3, ablation_runs=2)
QUICK = Scale(seed_steps=12, branch_steps=6, finetuning_steps=4, runs=1, ablation_runs=1, scored_tokens=1000)

NO_BALANCING = ["--router-aux-loss-coef", "0"]
MICRO_BATCHES = ["--per-device-train-batch-size", str(BATCH // 4), "--gradient-accumulation-steps", "4"]
MAIN, ABLATIONS, LATER, UNTRAINED = "main", "ablations", "later work", "without training"
"""The tables."""

FINETUNED: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    MAIN: {
        "BTX Top-2": ([], []),
        "BTX Top-2, no balancing": ([], NO_BALANCING),
        "BTX Sample Top-1": (["--router-type", "sample_top_1"], []),
    },
    ABLATIONS: {
        "Top-2, experts frozen": ([], ["--train", "shared"]),
        "Top-2, experts frozen, no balancing": ([], ["--train", "shared", *NO_BALANCING]),
        "blend": (["--expert-mode", "blend"], []),
        "split, top-2 of 8": (["--expert-mode", "split"], []),
        "split, top-4 of 8": (["--expert-mode", "split", "--num-experts-per-tok", "4"], []),
        "Switch, no balancing": (["--router-type", "switch"], NO_BALANCING),
        "Sample Top-1, no balancing": (["--router-type", "sample_top_1"], NO_BALANCING),
        "Soft, no balancing": (["--router-type", "soft"], NO_BALANCING),
    },
    LATER: {
        "4 micro-batches a step, balanced together": ([], MICRO_BATCHES),
        "4 micro-batches a step, each balanced": ([], [*MICRO_BATCHES, "--router-aux-loss-scope", "micro_batch"]),
        "dense router gradient": ([], ["--router-grad", "dense"]),
        "TIES at scale 0.5": (["--combine", "ties", "--scale", "0.5"], []),
        "DARE": (["--combine", "dare_linear"], []),
        "norms folded into the experts": (["--fold-norms"], []),
    },
}
"""What a merge and its finetuning are told, for each row of each table."""

RIDGE = ["--router-init", "ridge"]
LOGISTIC = ["--router-init", "logistic"]
REGMEAN = ["--combine", "regmean_merged", "--fit-through", "router"]
OWN_HEAD = ["--head", "fitted"]
TEXT_ALONE = "fitted by text alone"
"""What a merge does that is given text and nothing else: `REGMEAN`, `LOGISTIC`, `OWN_HEAD`. It is finetuned, too."""
FITTED = {
    "mean, logistic": LOGISTIC,
    "regmean_merged, logistic": [*REGMEAN, *LOGISTIC],
    "regmean_merged, ridge, a head of its own": [*REGMEAN, *RIDGE, *OWN_HEAD],
    TEXT_ALONE: [],
}
"""What a merge is told that is fitted and not trained."""
AFTER_A_FIT = {"fitted": "then finetuned", "taught": "then finetuned, taught by the sources"}
"""By kind of training, what a row is called."""
FF = "branches of feed-forward blocks alone"
LOOKED_AT = ("BTX Top-2", "Switch, no balancing", "Sample Top-1, no balancing", "Soft, no balancing")
"""The models whose routing is compared, layer by layer."""


def main_rows(run: Run) -> None:
    """Train and measure what the paper's main table compares, and merges that nothing was trained in."""
    run.dense_models()
    plain = run.merged("merged")
    run.measure_dense_models(MAIN, run.finetuned(plain, slug("finetuned", "BTX Top-2"), "merged"))
    upcycled, scale = run.upcycled(), run.scale
    ratio = active_parameters(run.seed) / active_parameters(upcycled)
    # as many steps as cost what the branches and a finetuning of their merge cost
    equal_compute = round(len(EXPERTS) * scale.branch_steps * ratio) + scale.finetuning_steps
    for name, steps in (("data-matched", scale.all_steps), ("compute-matched", equal_compute)):
        model = run.finetuned(upcycled, f"upcycled-{name}", "upcycled", steps=steps)
        run.measure(MAIN, f"sparse upcycling, {name}", model)
    finetuned_rows(run, MAIN)
    run.measure(UNTRAINED, "mean, random router", plain)
    fitted = {name: run.merged(slug("fitted", name), *words, fitted=True) for name, words in FITTED.items()}
    for name, merged in fitted.items():
        run.measure(UNTRAINED, name, merged)
    for kind, name in AFTER_A_FIT.items():
        model = run.finetuned(fitted[TEXT_ALONE], f"finetuned-{kind}", kind)
        run.measure(LATER, f"{TEXT_ALONE}, {name}", model)


def further_rows(run: Run) -> None:
    """Train and measure the ablations, and what later work adds."""
    finetuned_rows(run, ABLATIONS)
    finetuned_rows(run, LATER)
    ff = {domain: run.expert(f"{domain}-ff", domain, "--train", "ff").name for domain in EXPERTS}
    merged = run.merged("ff", experts=ff, fitted=True)
    run.measure(UNTRAINED, f"{FF}, {TEXT_ALONE}", merged)
    run.measure(LATER, f"{FF}, {TEXT_ALONE}, {AFTER_A_FIT['taught']}", run.finetuned(merged, "ff-taught", "taught"))


def finetuned_rows(run: Run, table: str) -> None:
    """Merge, finetune and measure the rows of a table."""
    for name, (merge_words, train_words) in FINETUNED[table].items():
        merged = run.merged(slug("merged", *merge_words), *merge_words)
        model = run.finetuned(merged, slug("finetuned", name), "merged", *train_words)
        run.measure(table, name, model)


def slug(*words: str) -> str:
    """Return a folder's name for some words.

    >>> slug("merged", "--router-type", "soft")
    'merged-router-type-soft'
    """
    letters = "".join(letter if letter.isalnum() else " " for letter in " ".join(words).lower())
    return "-".join(letters.split())


def routing_figures(run: Run) -> dict[str, Any]:
    """Look at who gets which tokens, with and without balancing, and by router."""
    texts = run.scored_words()
    looks = {name: [shown(run.folder / slug("finetuned", name)), *texts] for name in LOOKED_AT}
    looks[LOOKED_AT[0]] += ["--against", shown(run.folder / slug("finetuned", "BTX Top-2, no balancing"))]
    found = {}
    for name, words in looks.items():
        more = ["--no-ablation", "--page-tokens", "0"]
        if run.scale.scored_tokens is None:
            more += ["--tokens", "0"]  # all: a look is shorter otherwise
        folder = run.study.btx(run.folder / "looked-at" / slug(name), "routing", *words, *more)
        report = read_json(folder / "routing.json")
        found[name] = report["model"]
        if report["against"]:
            found[f"{name}, no balancing"] = report["against"]
    keys = ("domain", "share", "weight", "own_first")
    return {
        name: {
            "experts": model["experts"],
            "load": model["load"],
            "domains": [{key: domain[key] for key in keys} for domain in model["domains"]],
            "neglected": model["neglected"],
        }
        for name, model in found.items()
    }


def throughput(run: Run) -> dict[str, list[float]]:
    """Time two branches side by side, and one model on two ranks that sees the same tokens, three times in turns.

    Both are two processes with one thread each and the same number of tokens; only the ranks exchange gradients.
    """
    folder = run.folder / "throughput"
    steps = ["--max-steps", str(run.scale.branch_steps), "--max-length", str(WINDOW)]
    steps += ["--per-device-train-batch-size", str(BATCH), "--report-to", "none", "--holdout", "0"]
    texts = {name: ["--data", f"{name}={shown(text_file(run.texts, name, 'training'))}"] for name in EXPERTS[:2]}

    def branch(name: str, data: Sequence[str]) -> list[str]:
        words = ["branch", shown(run.seed), *data, "-o", shown(folder / name)]
        return ["btx_merge", *words, *steps, "--quiet", "--overwrite"]

    ranks = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    both = [word for data in texts.values() for word in data]
    commands = {
        "two branches side by side": [branch(name, data) for name, data in texts.items()],
        "one model on two ranks": [[*ranks, *branch("dense", both)]],
    }

    def build() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(3):
            for name, side_by_side in commands.items():
                seconds[name].append(wall_seconds(side_by_side))
        write_json(folder / "seconds.json", seconds)

    run.study.step(folder, commands, build)
    return read_json(folder / "seconds.json")


def wall_seconds(commands: Sequence[Sequence[str]]) -> float:
    """Run Python modules side by side, one thread each, and wait for the last.

    Raises:
        RuntimeError: one of them failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with stopwatch() as took:
        running = [subprocess.Popen([sys.executable, "-m", *words], env=environment) for words in commands]
        failed = [words for words, process in zip(commands, running, strict=True) if process.wait()]
    if failed:
        raise RuntimeError(f"failed: {failed}")
    return took[1]


def one_run(study: Study, scale: Scale, number: int, texts: Path) -> list[Row]:
    """Do all of one random seed. It has a process of its own, so its CPU seconds are its own too."""
    torch.set_num_threads(1)
    run = Run(study, scale, number, texts)
    main_rows(run)
    if number < scale.ablation_runs:
        further_rows(run)
    return run.rows


def all_rows(studies: Sequence[Study], scale: Scale, texts: Path) -> list[Row]:
    """Do all runs side by side."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit threads
    with ProcessPoolExecutor(len(studies), spawn) as pool:
        runs = [pool.submit(one_run, study, scale, number, texts) for number, study in enumerate(studies)]
        return [row for run in runs for row in run.result()]


def rates(scale: Scale, study: Study, texts: Path) -> None:
    """Try learning rates with half the steps, and keep what was found beside the figures."""
    steps = {name: getattr(scale, name) // 2 for name in ("seed_steps", "branch_steps", "finetuning_steps")}
    run = Run(study, replace(scale, **steps), 0, texts, "validation")
    write_json(study.folder.parent / "rates.json", try_rates(run))
    print(rates_table(read_json(study.folder.parent / "rates.json")))


@one_at_a_time()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, in a folder of its own")
    parser.add_argument("--rates", action="store_true", help="only try learning rates, on validation text")
    parser.add_argument("--wheel", type=Path, required=True, help="pretix, whose German messages are a domain")
    parser.add_argument("--folder", type=Path, help="where all is kept [demo/reproduction, or reproduction-quick]")
    options = parser.parse_args()
    scale = QUICK if options.quick else FULL
    folder = options.folder or ROOT / "demo" / ("reproduction-quick" if options.quick else "reproduction")
    wheel = options.wheel.name
    texts = Study(folder).step(folder / "texts", wheel, lambda: write_texts(folder / "texts", options.wheel))
    if options.rates:
        rates(scale, Study(folder / "rates", wheel), texts)
        return
    studies = [Study(folder / str(number), wheel) for number in range(scale.runs)]
    rows = all_rows(studies, scale, texts)
    finished = [Run(Study(study.folder, wheel), scale, number, texts) for number, study in enumerate(studies)]
    first = finished[0]
    figures = {
        "machine": machine(),
        "scale": asdict(scale),
        "step_tokens": STEP_TOKENS,
        "parameters": active_parameters(first.seed),
        "rates": read_json(folder / "rates.json") if (folder / "rates.json").exists() else None,
        "rows": [asdict(row) for row in rows],
        "routing": [routing_figures(run) for run in finished[: scale.ablation_runs]],
        "throughput": throughput(first),
        "cpu_seconds": sum(run.study.cost().cpu_seconds for run in finished),
    }
    write_json(folder / "figures.json", figures)
    print(tables(figures))
    console.print(f"\nwritten {folder / 'figures.json'}")


def machine() -> dict[str, Any]:
    """Say what the figures were measured on."""
    return {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "btx-merge": btx_merge.__version__,
    }


if __name__ == "__main__":
    main()
