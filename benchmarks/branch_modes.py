"""What `btx branch --train all` and `--train ff` are worth: the branches, and their merges with fitted routers.

    make demo && python benchmarks/branch_modes.py          the demo's seed and texts, 100 steps a branch

Both train on the same windows for the same number of steps. Printed are bits per byte of held-out text by domain: of
the seed, of each domain's own branch, of the merge, and of the merge with every token sent to its own domain's expert.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

DOMAINS = ("code", "math", "english")
TRAINING = (
    *("--max-steps=100", "--per-device-train-batch-size=8", "--learning-rate=1.5e-3", "--max-length=128"),
    *("--holdout=0", "--shuffle=10000"),  # windows from the whole text; what is measured is held out already
)
MERGES = {"all, mean": ("all", "mean"), "all, regmean_merged": ("all", "regmean_merged"), "ff, mean": ("ff", "mean")}


def btx(*words: object) -> str:
    """Run the command and return what it printed."""
    command = [str(Path(sys.executable).parent / "btx"), *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="where `make demo` has put seed and texts")
    parser.add_argument("--output", type=Path, default=Path("demo/branch-modes"))
    options = parser.parse_args()
    seed, out = options.demo / "seed", options.output
    out.mkdir(parents=True, exist_ok=True)
    training = {domain: options.demo / "texts" / f"{domain}.jsonl" for domain in DOMAINS}
    held_out = [f"--data={domain}={options.demo / 'texts' / f'{domain}-held-out.jsonl'}" for domain in DOMAINS]

    for mode in ("all", "ff"):
        for domain in DOMAINS:
            folder = out / mode / domain
            if not folder.exists():
                btx(
                    "branch",
                    seed,
                    f"--data={domain}={training[domain]}",
                    f"--train={mode}",
                    *TRAINING,
                    "--report-to=none",
                    "-q",
                    "-o",
                    folder,
                )

    fitted_on = [f"--domain-text={domain}={training[domain]}" for domain in DOMAINS]
    for name, (mode, combine) in MERGES.items():
        merged = out / f"{mode}-{combine}"
        experts = [f"--expert={domain}={out / mode / domain}" for domain in DOMAINS]
        how = (f"--combine={combine}", "--router-init=ridge", "--fit-through=router", "--domain-tokens=30000")
        btx("merge", "--seed", seed, *experts, *how, *fitted_on, "--overwrite", "-q", "-o", merged)
        sources = [f"--source=seed={seed}", *(f"--source={domain}={out / mode / domain}" for domain in DOMAINS)]
        print(f"--- {name}")
        print(btx("eval", merged, *held_out, *sources, "--routing=domain", "--window=127"))


if __name__ == "__main__":
    main()
