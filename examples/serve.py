"""Use an export: it is a Mixtral, so transformers loads it, and this script does not need btx-merge.

make demo                                         # makes demo/fitted; or name your own merged model
btx export demo/fitted demo/mixtral --overwrite
python examples/serve.py
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model: Any = AutoModelForCausalLM.from_pretrained("demo/mixtral", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("demo/mixtral")
print(f"{type(model).__name__} with {model.config.num_local_experts} experts")

prompts = ["def __init__(self, name):", "This function returns"]
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
