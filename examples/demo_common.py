"""What the two demos share: their texts, an untrained model, and what comes behind the training."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demo_texts import DOMAINS, load_corpora
from filelock import FileLock, Timeout
from steps import ROOT, Steps, console, shown
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

TEXTS = ROOT / "demo" / "texts"
SECONDS_BETWEEN_LINES = 5


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Both demos write into one folder: a second one waits, then finds the work done."""
    (ROOT / "demo").mkdir(exist_ok=True)
    lock = FileLock(ROOT / "demo" / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        console.print("another demo is at work in this folder: waiting for it to end")
        lock.acquire()
    os.chdir(ROOT)  # commands give paths from there
    try:
        yield
    finally:
        lock.release()


def write_texts() -> None:
    """Write each domain's training and held-out texts as a user has them: one JSON line per document."""
    shutil.rmtree(TEXTS, ignore_errors=True)
    TEXTS.mkdir(parents=True)
    told = time.monotonic()

    def tell(domain: str, files: int) -> None:
        """Print how far the reading is, for machines on which it takes long."""
        nonlocal told
        if time.monotonic() - told > SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            console.print(f"{domain}: {files} files read", style="dim")

    for domain, corpus in load_corpora(tell):
        for file, documents in ((training(domain), corpus.train), (held_out(domain), corpus.heldout)):
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), "utf-8")
        sizes = [sum(map(len, documents)) / 1000 for documents in (corpus.train, corpus.heldout)]
        console.print(f"{domain}: {sizes[0]:.0f} KB to train on, {sizes[1]:.0f} KB held out")


def save_untrained(folder: Path, model: Mapping[str, Any], files: Sequence[Path], seed: int = 0) -> None:
    """Save a Llama with random weights, and a byte-level BPE tokenizer learned on texts.

    Args:
        model: values of its `LlamaConfig`.
        files: JSON lines with the texts.
        seed: of the weights.
    """
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=model["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    window = model["max_position_embeddings"]
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=window
    )
    config = LlamaConfig(**model, bos_token_id=fast.bos_token_id, eos_token_id=fast.eos_token_id)
    set_seed(seed)
    untrained = LlamaForCausalLM(config)
    untrained.save_pretrained(folder)
    fast.save_pretrained(folder)
    console.print(f"a Llama with {untrained.num_parameters() / 1e6:.1f} million random weights")


def training(domain: str) -> Path:
    """Return the file that experts of a domain are trained on."""
    return TEXTS / f"{domain}.jsonl"


def held_out(domain: str) -> Path:
    """Return the file of a domain that nothing is trained, fitted or chosen on."""
    return TEXTS / f"{domain}-held-out.jsonl"


def texts(flag: str, file_of: Callable[[str], Path], domains: tuple[str, ...] = DOMAINS) -> list[str]:
    """Return the words of a command that give it each domain's text: `--data code=...`."""
    return [word for domain in domains for word in (flag, f"{domain}={shown(file_of(domain))}")]


def merge_and_look(
    demo: Steps, folder: Path, fit: list[str], *, window: int, tokens: int | None = None, routed: int = 6000
) -> None:
    """Merge what lies in a demo's folder, say what that is worth, and show which expert gets which tokens.

    Args:
        fit: further options of the merge that is fitted.
        tokens: of each domain's held-out text, where not all of it is measured.
        routed: tokens of each domain whose routing is looked at, in two passes for each expert.
    """
    sources = ["--seed", shown(folder / "seed")]
    for domain in DOMAINS:
        sources += ["--expert", f"{domain}={shown(folder / domain)}"]

    console.rule("[bold]Mix: the experts in one model, with random routers, and with everything fitted", align="left")
    random = demo.btx(folder / "btx", "merge", *sources)
    fitted = demo.btx(folder / "fitted", "merge", *sources, *texts("--domain-text", training), *fit)

    console.rule("[bold]What is it worth?", align="left")
    measured = [*texts("--data", held_out), "--window", str(window)]
    if tokens:
        measured += ["--tokens", str(tokens)]
    further = ["--soup", "--against", f"random={shown(random)}"]
    demo.btx(folder / "evaluation", "eval", shown(fitted), *measured, *further)

    console.rule("[bold]Who gets which tokens?", align="left")
    looked_at = [*texts("--data", held_out), "--window", str(window), "--tokens", str(routed)]
    routing = demo.btx(folder / "routing", "routing", shown(fitted), *looked_at)
    console.print(f"\nopen {shown(routing / 'report.html')} in a browser", style="bold")
    console.print(f"\n{time.perf_counter() - demo.began:.0f} s in all", style="dim")
