"""Train a LoRA on the routers and the attention of a merged model, with a Trainer of your own.

make demo                 # makes demo/fitted; or name your own merged model below
python examples/lora.py
"""

import json
from pathlib import Path

from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from btx_merge.lora import lora_config

tokenizer = AutoTokenizer.from_pretrained("demo/fitted")
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained("demo/fitted")
adapted = get_peft_model(model, lora_config("routers + shared", model, r=16))
adapted.print_trainable_parameters()

lines = Path("demo/texts/code.jsonl").read_text(encoding="utf-8").splitlines()[:40]
texts = [tokenizer(json.loads(line)["text"], truncation=True, max_length=128) for line in lines]
settings = TrainingArguments("demo/my-lora", max_steps=5, logging_steps=1, report_to="none", use_cpu=True)
Trainer(adapted, settings, DataCollatorForLanguageModeling(tokenizer, mlm=False), texts).train()
adapted.save_pretrained("demo/my-lora")  # or: adapted.merge_and_unload().save_pretrained(...)
