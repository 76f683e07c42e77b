"""Branch-Train-MiX from start to finish, with the commands of `btx` and nothing else that matters.

    python examples/demo.py

A small Llama is trained as the seed; three copies of it are trained on, each on its own domain; they are merged into a
mixture of experts; the merge is measured against all it was made of. Texts come from what Python and our dependencies
install. Everything is kept under `demo/`; what is finished is not done again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import demo_common as common
from demo_common import ROOT, console, shown, texts, training
from demo_texts import DOMAINS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

DEMO = ROOT / "demo"
WINDOW = 128
MODEL: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
SEED_STEPS, EXPERT_STEPS = 300, 100
TRAINING = ["--max-length", str(WINDOW), "--per-device-train-batch-size", "8", "--logging-steps", "20"]
TRAINING += ["--report-to", "none"]
FIT = ["--domain-tokens", "30000"]


def untrained_llama(folder: Path) -> None:
    """Save a Llama with random weights, and a tokenizer learned on the training texts of all domains."""
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [line for domain in DOMAINS for line in training(domain).read_text("utf-8").splitlines()]
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=WINDOW
    )
    config = LlamaConfig(**MODEL, bos_token_id=fast.bos_token_id, eos_token_id=fast.eos_token_id)
    set_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    console.print(f"a Llama with {model.num_parameters() / 1e6:.1f} million random weights")


@common.one_at_a_time()
def main() -> None:
    demo = common.Demo(DEMO)
    console.rule("[bold]Three domains of text", align="left")
    demo.step(common.TEXTS, "texts", common.write_texts)

    console.rule("[bold]A seed, trained on all three", align="left")
    untrained = DEMO / "untrained"
    demo.step(untrained, MODEL, lambda: untrained_llama(untrained))
    steps = ["--max-steps", str(SEED_STEPS), "--learning-rate", "3e-3", *TRAINING]
    demo.btx("seed", "branch", shown(untrained), *texts("--data", training), *steps)

    console.rule("[bold]Branch and train: three copies of it, each on its own domain", align="left")
    steps = ["--max-steps", str(EXPERT_STEPS), "--learning-rate", "1.5e-3", *TRAINING]
    for domain in DOMAINS:
        demo.btx(domain, "branch", "demo/seed", *texts("--data", training, (domain,)), *steps)

    common.merge_and_look(demo, FIT, window=WINDOW - 1)


if __name__ == "__main__":
    main()
