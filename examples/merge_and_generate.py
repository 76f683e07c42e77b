"""Merge a seed and two experts, fit the result, and let it write.

make demo                                # trains the models that are merged here; or name your own below
python examples/merge_and_generate.py
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from btx_merge import MergeRecipe, Options, merge

recipe = MergeRecipe.from_dict(
    {
        "seed": "demo/seed",  # a folder, or a model of the Hub: org/name
        "experts": {"code": "demo/code", "math": "demo/math"},
        # what routers, shared weights and head are fitted on; leave it out where you will train them
        "domain_text": {"code": "demo/texts/code.jsonl", "math": "demo/texts/math.jsonl"},
        "domain_tokens": 20_000,
    }
)
report = merge(recipe, "demo/my-btx", Options(overwrite=True))
print(f"merged in {report.seconds:.1f} s with {report.peak_memory / 1e6:.0f} MB of memory")

model: Any = AutoModelForCausalLM.from_pretrained("demo/my-btx", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("demo/my-btx")
inputs = tokenizer("def __init__(self, name):", return_tensors="pt")
with torch.inference_mode():
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
