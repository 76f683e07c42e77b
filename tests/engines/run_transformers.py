"""Runs in the environment of another transformers: the logits of checkpoints, and how their tokenizers read lines.

python run_transformers.py LINES FOLDER ..., LINES in JSON; a folder has `model` and `ids.pt`, and gets `out.pt`.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    for folder in map(Path, sys.argv[2:]):
        model, info = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto", output_loading_info=True)
        assert not any(info.values()), info
        ids = torch.load(folder / "ids.pt")
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        about = {
            "class": type(model).__name__,
            "ids": [tokenizer(line)["input_ids"] for line in json.loads(sys.argv[1])],
        }
        torch.save({"logits": model.eval()(ids).logits, **about}, folder / "out.pt")


if __name__ == "__main__":
    main()
