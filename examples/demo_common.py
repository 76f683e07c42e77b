"""What the two demos share: their texts, the call of `btx`, and the memory of what is finished."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Read at import. All that the demos use lies on this machine, so no library is to ask a server for it.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
    # Threads that wait for each other give up their core soon: without this, training takes three times as
    # long where another program keeps one of two cores busy.
    "GOMP_SPINCOUNT": "1000",
}

from demo_texts import DOMAINS, load_corpora
from filelock import FileLock, Timeout
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from btx_merge.cli.app import app
from btx_merge.finetuning.work_folder import last_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ROOT / "demo" / "texts"
SECONDS_BETWEEN_LINES = 5
console = Console(highlight=False)


class Demo:
    """Steps that each fill one folder. A step is done again only when it, or one before it, has changed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.began = time.perf_counter()
        self._record = folder / "finished.json"
        self._finished = json.loads(self._record.read_text()) if self._record.exists() else {}
        self._key = package_fingerprint()

    def step(self, output: Path, what: object, build: Callable[[], object]) -> None:
        """Have `build` fill `output`, unless it was filled by the same steps before.

        Args:
            what: all that decides the result, beside the steps before this one.
        """
        self._key = fingerprint(self._key, what)
        name = output.name
        if output.exists() and self._finished.get(name) == self._key:
            console.print("finished by an earlier run", style="dim")
            return
        began = time.perf_counter()
        self._finished.pop(name, None)
        build()
        console.print(f"{time.perf_counter() - began:.0f} s", style="dim")
        self._finished[name] = self._key
        self._record.write_text(json.dumps(self._finished, indent=1))

    def btx(self, output: str, *words: str) -> None:
        """Run a command of `btx` that writes the folder `output`, as a terminal would."""
        folder = self.folder / output
        line = ["btx", *words, "-o", shown(folder)]
        console.print(f"\n[bold]$ {shlex.join(line)}[/]", soft_wrap=True)

        def build() -> None:
            run_btx(line[1:], folder, self._key)

        self.step(folder, line, build)

    def close(self) -> None:
        """Say how long all of it took."""
        console.print(f"\n{time.perf_counter() - self.began:.0f} s in all", style="dim")


def run_btx(words: Sequence[str], output: Path, key: str) -> None:
    """Run a command of `btx`; a training that was ended in its midst goes on from its last checkpoint.

    Args:
        key: of all that decides the result. What was begun under another key is not gone on with.
    """
    work, begun = (output.with_name(output.name + ending) for ending in (".btx-training", ".begun"))
    if not begun.exists() or begun.read_text() != key:
        shutil.rmtree(work, ignore_errors=True)
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.write_text(key)
    is_kept = last_checkpoint(work)
    code = app([*words, "--overwrite", *(["--resume"] if is_kept else [])], standalone_mode=False)
    if code:
        sys.exit(code)
    begun.unlink()


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


def shown(path: Path) -> str:
    """Return a path as the commands give it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def fingerprint(*parts: object) -> str:
    """Return a key for work: what goes into it, by its `repr`."""
    return hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest()


def package_fingerprint() -> str:
    """Return a key for the code that models and texts are made with; the commands have keys of their own."""
    files = [file for folder in ("btx_merge", "modeling") for file in sorted((ROOT / folder).rglob("*.py"))]
    files += [ROOT / "examples" / name for name in ("demo_common.py", "demo_texts.py", "reproduce_texts.py")]
    return fingerprint([(str(file.relative_to(ROOT)), file.read_text("utf-8")) for file in files])


def merge_and_look(demo: Demo, fit: list[str], *, window: int, tokens: int | None = None, routed: int = 6000) -> None:
    """Merge what lies in a demo's folder, say what that is worth, and show which expert gets which tokens.

    Args:
        fit: further options of the merge that is fitted.
        tokens: of each domain's held-out text, where not all of it is measured.
        routed: tokens of each domain whose routing is looked at, in two passes for each expert.
    """
    folder = shown(demo.folder)
    sources = ["--seed", f"{folder}/seed"]
    for domain in DOMAINS:
        sources += ["--expert", f"{domain}={folder}/{domain}"]

    console.rule("[bold]Mix: the experts in one model, with random routers, and with everything fitted", align="left")
    demo.btx("btx", "merge", *sources)
    demo.btx("fitted", "merge", *sources, *texts("--domain-text", training), *fit)

    console.rule("[bold]What is it worth?", align="left")
    measured = [*texts("--data", held_out), "--window", str(window)]
    if tokens:
        measured += ["--tokens", str(tokens)]
    further = ["--soup", "--against", f"random={folder}/btx"]
    demo.btx("evaluation", "eval", f"{folder}/fitted", *measured, *further)

    console.rule("[bold]Who gets which tokens?", align="left")
    looked_at = [*texts("--data", held_out), "--window", str(window), "--tokens", str(routed)]
    demo.btx("routing", "routing", f"{folder}/fitted", *looked_at)
    console.print(f"\nopen {shown(demo.folder / 'routing' / 'report.html')} in a browser", style="bold")
    demo.close()
