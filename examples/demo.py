"""Branch-Train-MiX from start to finish, with the commands of `btx` and nothing else that matters.

    python examples/demo.py

A small Llama is trained as the seed; three copies of it are trained on, each on its own domain; they are merged into a
mixture of experts; the merge is measured against all it was made of. Texts come from what Python and our dependencies
install. Everything is kept under `demo/`; what is finished is not done again.
"""

from __future__ import annotations

from typing import Any

import demo_common as common
from demo_common import texts, training
from demo_texts import DOMAINS
from steps import ROOT, Steps, console, shown

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


@common.one_at_a_time()
def main() -> None:
    demo = Steps(DEMO)
    console.rule("[bold]Three domains of text", align="left")
    demo.step(common.TEXTS, "texts", common.write_texts)

    console.rule("[bold]A seed, trained on all three", align="left")
    untrained = DEMO / "untrained"
    files = [training(domain) for domain in DOMAINS]
    demo.step(untrained, MODEL, lambda: common.save_untrained(untrained, MODEL, files), [*map(shown, files)])
    steps = ["--max-steps", str(SEED_STEPS), "--learning-rate", "3e-3", *TRAINING]
    seed = demo.btx(DEMO / "seed", "branch", shown(untrained), *texts("--data", training), *steps)

    console.rule("[bold]Branch and train: three copies of it, each on its own domain", align="left")
    steps = ["--max-steps", str(EXPERT_STEPS), "--learning-rate", "1.5e-3", *TRAINING]
    for domain in DOMAINS:
        demo.btx(DEMO / domain, "branch", shown(seed), *texts("--data", training, (domain,)), *steps)

    common.merge_and_look(demo, DEMO, FIT, window=WINDOW - 1)


if __name__ == "__main__":
    main()
