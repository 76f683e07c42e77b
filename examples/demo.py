"""A merge from start to finish: train a small Llama and three experts, merge them, fit, finetune, measure, generate.

    python examples/demo.py

Everything is made on this machine: the texts from what Python and our dependencies install, the tokenizer,
the seed, the experts. It is kept under `demo/`; what is finished is not done again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import demo_common as common
from demo_common import ROOT, console
from demo_texts import Corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

DEMO = ROOT / "demo"


@dataclass(frozen=True)
class Settings:
    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    initializer_range: float = 0.05
    window: int = 128
    batch_size: int = 4
    seed_steps: int = 1000
    seed_learning_rate: float = 3e-3
    expert_steps: int = 300
    expert_learning_rate: float = 1.5e-3


SETTINGS = Settings()
FIT_TOKENS = 100_000
FINETUNING = {"max_steps": 300, "learning_rate": 3e-4, "per_device_train_batch_size": 8}


def train_tokenizer(corpora: dict[str, Corpus]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, learned on the training texts of all domains."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SETTINGS.vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for corpus in corpora.values() for text in corpus.train), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=SETTINGS.window,
    )


def new_seed(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=SETTINGS.hidden_size,
        intermediate_size=SETTINGS.intermediate_size,
        num_hidden_layers=SETTINGS.layers,
        num_attention_heads=SETTINGS.heads,
        num_key_value_heads=SETTINGS.kv_heads,
        max_position_embeddings=SETTINGS.window,
        initializer_range=SETTINGS.initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    set_seed(0)
    return LlamaForCausalLM(config)


def build_seed(folder: Path, corpora: dict[str, Corpus], tokenizer: PreTrainedTokenizerBase) -> None:
    model = new_seed(tokenizer)
    console.print(f"the seed has {model.num_parameters() / 1e6:.1f} million parameters")
    documents = [text for corpus in corpora.values() for text in corpus.train]
    common.train(
        model,
        common.pack(documents, tokenizer, SETTINGS.window),
        "seed",
        max_steps=SETTINGS.seed_steps,
        per_device_train_batch_size=SETTINGS.batch_size,
        learning_rate=SETTINGS.seed_learning_rate,
        warmup_steps=50,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_expert(folder: Path, domain: str, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
    """The seed, trained further on one domain alone."""
    model = AutoModelForCausalLM.from_pretrained(DEMO / "seed")
    common.train(
        model,
        common.pack(corpus.train, tokenizer, SETTINGS.window),
        f"expert {domain}",
        max_steps=SETTINGS.expert_steps,
        per_device_train_batch_size=SETTINGS.batch_size,
        learning_rate=SETTINGS.expert_learning_rate,
        warmup_steps=20,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@common.one_at_a_time()
def main() -> None:
    clock = common.Clock()

    console.rule("[bold]Three domains", align="left")
    with clock.part("texts") as was_cached:
        corpora, was_cached[0] = common.load_cached_corpora(DEMO / "texts")
    common.print_corpora(corpora)

    console.rule("[bold]A seed, and one expert per domain", align="left")
    tokenizer_key = common.fingerprint(corpora, SETTINGS, train_tokenizer)
    with clock.part("tokenizer") as was_cached:
        was_cached[0] = common.cached(
            DEMO / "tokenizer", tokenizer_key, lambda folder: train_tokenizer(corpora).save_pretrained(folder)
        )
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "tokenizer")

    seed_key = common.fingerprint(tokenizer_key, new_seed, build_seed, common.pack, common.train)
    with clock.part("seed") as was_cached:
        was_cached[0] = common.cached(DEMO / "seed", seed_key, lambda folder: build_seed(folder, corpora, tokenizer))

    expert_key = common.fingerprint(seed_key, build_expert)
    for domain, corpus in corpora.items():
        build = partial(build_expert, domain=domain, corpus=corpus, tokenizer=tokenizer)
        with clock.part(f"expert {domain}") as was_cached:
            was_cached[0] = common.cached(DEMO / domain, expert_key, build)

    common.merge_and_show(DEMO, corpora, SETTINGS.window, clock, fit_tokens=FIT_TOKENS, finetuning=FINETUNING)


if __name__ == "__main__":
    main()
