"""What the two demos share: three text domains, the cache, the call of `btx`, the measuring, the printing.

Shapes: N windows, T tokens per window, V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
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

import demo_texts
import torch
from demo_texts import DOMAINS, Corpus
from filelock import FileLock, Timeout
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = {
    "code": "    def __init__(self, name, value=None):",
    "english": "This function returns",
    "math": "Returns the derivative of the function.\n\nExamples\n========\n\n>>> from sympy import",
}
console = Console(highlight=False)
progress_console = Console(stderr=True)


# --- texts ------------------------------------------------------------------------------------------------


def load_cached_corpora(folder: Path) -> tuple[dict[str, Corpus], bool]:
    """The corpora as they were read before, where `demo_texts` and the installed sources are the same."""
    versions = [sys.version, *(version(package) for package in ("sympy", "mpmath"))]

    def build(partial: Path) -> None:
        texts = {domain: asdict(corpus) for domain, corpus in demo_texts.load_corpora().items()}
        (partial / "corpora.json").write_text(json.dumps(texts), "utf-8")

    was_cached = cached(folder, fingerprint(Path(demo_texts.__file__).read_text("utf-8"), versions), build)
    texts = json.loads((folder / "corpora.json").read_text("utf-8"))
    return {domain: Corpus(**texts[domain]) for domain in DOMAINS}, was_cached


def print_corpora(corpora: dict[str, Corpus]) -> None:
    table = Table("domain", box=None, pad_edge=False)
    for heading in ("train files", "KB", "held-out files", "KB"):
        table.add_column(heading, justify="right")
    for domain, corpus in corpora.items():
        cells = [domain]
        for documents in (corpus.train, corpus.heldout):
            cells += [str(len(documents)), f"{sum(map(len, documents)) / 1000:.0f}"]
        table.add_row(*cells)
    console.print(table)


# --- cache ------------------------------------------------------------------------------------------------

KEY_FILE = "demo_key.txt"


def fingerprint(*parts: object) -> str:
    """A key for work: what goes into it. Pass a function to have its source text counted."""
    texts = [inspect.getsource(part) if callable(part) else repr(part) for part in parts]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """A key for a checkpoint: the bytes of everything that decides what the model computes."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".py"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while piece := file.read(1 << 24):
                    digest.update(piece)
    return digest.hexdigest()


def cached(folder: Path, key: str, build: Callable[[Path], object]) -> bool:
    """Have `build` fill `folder`, unless it was filled under this key before. Returns whether it was.

    The work is done in a sibling that gets its name at the end: whatever bears the name is complete.
    """
    key_file = folder / KEY_FILE
    if key_file.exists() and key_file.read_text() == key:
        return True
    partial = folder.with_name(f".{folder.name}.partial")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    build(partial)
    (partial / KEY_FILE).write_text(key)
    partial.rename(folder)
    return False


def cached_output(folder: Path, key: str, build: Callable[..., object]) -> bool:
    """The same for a `btx` command, which finishes its `output` in one step by itself."""
    key_file = folder / KEY_FILE
    if key_file.exists() and key_file.read_text() == key:
        return True
    build(output=folder)
    key_file.write_text(key)
    return False


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
    try:
        yield
    finally:
        lock.release()


@dataclass
class Clock:
    """Notes how long each part took; a part that had nothing to do sets `was_cached`."""

    parts: list[tuple[str, float, bool]] = field(default_factory=list)

    @contextmanager
    def part(self, name: str) -> Iterator[list[bool]]:
        start, was_cached = time.perf_counter(), [False]
        yield was_cached
        self.parts.append((name, time.perf_counter() - start, was_cached[0]))

    def print(self) -> None:
        table = Table("part", box=None, pad_edge=False)
        table.add_column("seconds", justify="right")
        table.add_column("")
        for name, seconds, was_cached in self.parts:
            table.add_row(name, f"{seconds:.1f}", "[dim]cached[/]" if was_cached else "")
        table.add_row("[bold]all[/]", f"[bold]{sum(seconds for _, seconds, _ in self.parts):.1f}[/]", "")
        console.print(table)


# --- training ---------------------------------------------------------------------------------------------


def pack(documents: list[str], tokenizer: PreTrainedTokenizerBase, window: int) -> torch.Tensor:
    """The documents, each closed by the end-of-text token, as one stream cut into windows: [N, T]."""
    stream: list[int] = []
    for ids in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    usable = len(stream) // window * window
    return torch.tensor(stream[:usable]).view(-1, window)


def train(model: Any, windows: torch.Tensor, label: str, **arguments: Any) -> None:
    """A plain `transformers.Trainer` run; `arguments` are `TrainingArguments`. One line says how it went."""
    settings: dict[str, Any] = {
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "logging_steps": 0.1,  # a tenth of the steps
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.95,
        "seed": 0,
    }
    dataset = [{"input_ids": window, "labels": window} for window in windows]
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("step {task.completed}/{task.total}  loss {task.fields[loss]}"),
        TimeRemainingColumn(),
        console=progress_console,
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with TemporaryDirectory() as output_dir, progress:  # the Trainer makes its folder even to save nothing
        settings |= {"output_dir": output_dir, **arguments}
        trainer = Trainer(model, TrainingArguments(**settings), train_dataset=dataset)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_ShowProgress(progress, label))
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = trainer.state.global_step * trainer.args.train_batch_size * windows.shape[1]
    tokens *= trainer.args.gradient_accumulation_steps
    console.print(f"{label}: {tokens:,} tokens, training loss {losses[-1]:.2f} at the end")


class _ShowProgress(TrainerCallback):
    def __init__(self, progress: Progress, label: str) -> None:
        self.progress = progress
        self.label = label

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.progress.add_task(self.label, total=state.max_steps, loss="…")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.progress.update(self.task, loss=f"{float(logs['loss']):.2f}")


# --- merging ----------------------------------------------------------------------------------------------


def run_btx(*words: str) -> None:
    """Show a `btx` command line and run it."""
    console.print(f"[bold]$ {shlex.join(['btx', *words])}[/]", soft_wrap=True)
    btx = Path(sys.executable).parent / "btx"
    if not btx.exists():
        sys.exit(f"{btx} is missing: install the package into this environment with `pip install -e .`")
    done = subprocess.run([str(btx), *words], cwd=ROOT, check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)


def shown(path: Path) -> str:
    """A path as the commands give it."""
    return str(path.relative_to(ROOT))


def merge(seed: Path, experts: dict[str, Path], output: Path, *further: str) -> None:
    sources = [word for name, folder in experts.items() for word in ("--expert", f"{name}={shown(folder)}")]
    run_btx("merge", "--seed", shown(seed), *sources, *further, "-o", shown(output), "--overwrite")


def merge_fitted(seed: Path, experts: dict[str, Path], output: Path, texts: dict[str, Path], tokens: int) -> None:
    """The same merge with routers and shared weights fitted in closed form."""
    given = [word for name, file in texts.items() for word in ("--domain-text", f"{name}={shown(file)}")]
    fit = ("--combine", "regmean_merged", "--router-init", "ridge", "--fit-through", "router")
    merge(seed, experts, output, *fit, *given, "--domain-tokens", str(tokens))


def finetune(model: Path, output: Path, texts: dict[str, Path], **arguments: object) -> None:
    """Routers and shared weights, trained on all domains together."""
    given = [word for name, file in texts.items() for word in ("--data", f"{name}={shown(file)}")]
    options = [word for name, value in arguments.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    run_btx("train", shown(model), *given, *options, "--report-to", "none", "-o", shown(output), "--overwrite")


def write_texts(folder: Path, corpora: dict[str, Corpus]) -> dict[str, Path]:
    """The training texts as a user has them: one JSON line per document."""
    files = {domain: folder / f"{domain}.jsonl" for domain in DOMAINS}
    for domain, file in files.items():
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpora[domain].train), "utf-8")
    return files


# --- measuring --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What a model makes of one held-out text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """Per token: comparable only between models with the same tokenizer."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


@torch.inference_mode()
def score(model: Any, tokenizer: PreTrainedTokenizerBase, text: str, window: int) -> Score:
    """Score a text in windows of equal length, so without padding, every token but each window's first."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    starts = range(0, len(ids) - window + 1, window)
    nats = 0.0
    for i in range(0, len(starts), 8):
        batch = torch.tensor([ids[start : start + window] for start in starts[i : i + 8]])  # [N, T]
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()  # [N, T-1, V]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        nats += loss.item()
    scored = [text[offsets[start + 1][0] : offsets[start + window - 1][1]] for start in starts]
    return Score(nats, len(starts) * (window - 1), sum(len(part.encode()) for part in scored))


def load(checkpoint: Path) -> Any:
    """A model ready to be used; transformers puts a PEFT adapter onto its base by itself."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    return model.eval()


Scores = dict[str, dict[str, Score]]
"""By model, then by domain."""


def score_all(
    checkpoints: dict[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    texts: dict[str, str],
    window: int,
    cache: Path,
) -> tuple[Scores, bool]:
    """Score every checkpoint on every text; the very same tokens for all. A checkpoint is scored once."""
    scores: Scores = {}
    was_cached = True
    seed_key = folder_fingerprint(checkpoints["seed"])  # an adapter's scores depend on the seed, too
    for name, folder in checkpoints.items():

        def build(partial: Path, folder: Path = folder) -> None:
            model = load(folder)
            measured = {domain: asdict(score(model, tokenizer, text, window)) for domain, text in texts.items()}
            (partial / "scores.json").write_text(json.dumps(measured))

        key = fingerprint(seed_key, folder_fingerprint(folder), texts, window, score)
        was_cached &= cached(cache / name, key, build)
        measured = json.loads((cache / name / "scores.json").read_text())
        scores[name] = {domain: Score(**measured[domain]) for domain in texts}
    return scores, was_cached


def print_scores(scores: Scores) -> None:
    """One row per model, one column per domain, the best of every column marked."""
    table = Table(title="Held-out text: perplexity per token, bits per byte", box=SIMPLE_HEAD)
    table.add_column("model")
    for domain in DOMAINS:
        table.add_column(f"{domain}  ", justify="right")
    table.add_column("mean of bits  ", justify="right")
    best = {domain: best_model(scores, domain) for domain in DOMAINS}
    lowest = min(scores, key=lambda name: mean_bits(scores[name]))
    for name, by_domain in scores.items():
        cells = [name]
        for domain, score in by_domain.items():
            cells.append(_mark(f"{score.perplexity:.2f}  {score.bits_per_byte:.3f}", name == best[domain]))
        cells.append(_mark(f"{mean_bits(by_domain):.3f}", name == lowest))
        table.add_row(*cells, end_section=name in ("seed", DOMAINS[-1]))
    console.print(table)
    console.print("Lower is better, * is the best of its column.")


def _mark(cell: str, best: bool) -> str:
    return f"[bold green]{cell} *[/]" if best else f"{cell}  "


def best_model(scores: Scores, domain: str) -> str:
    return min(scores, key=lambda name: scores[name][domain].bits_per_byte)


def mean_bits(by_domain: dict[str, Score]) -> float:
    return sum(score.bits_per_byte for score in by_domain.values()) / len(by_domain)


def conclusion(scores: Scores) -> str:
    """What the numbers say, in words."""
    winners = [f"{best_model(scores, domain)} on {domain}" for domain in DOMAINS]
    lines = [f"Best are {', '.join(winners)}."]
    singles = ("seed", *DOMAINS)
    oracle = {domain: min(scores[name][domain].bits_per_byte for name in singles) for domain in DOMAINS}
    means = {name: mean_bits(by_domain) for name, by_domain in scores.items()}
    for name in scores.keys() - set(singles):
        closed = [
            (scores["seed"][domain].bits_per_byte - scores[name][domain].bits_per_byte)
            / (scores["seed"][domain].bits_per_byte - oracle[domain])
            for domain in DOMAINS
        ]
        change = means[name] / means["seed"] - 1
        lines.append(
            f"{name}: {abs(change):.1%} {_more(change)} bits than the seed, {sum(closed) / len(closed):.0%} of the "
            "way from the seed to the best expert of each domain."
        )
    return "\n".join([lines[0], *sorted(lines[1:], key=lambda line: list(scores).index(line.partition(":")[0]))])


def _more(difference: float) -> str:
    return "more" if difference > 0 else "fewer"


# --- generating -------------------------------------------------------------------------------------------


@torch.inference_mode()
def print_continuations(model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int = 48) -> None:
    set_seed(0)
    for domain, prompt in PROMPTS.items():
        inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=True, temperature=0.7, top_p=0.9)
        new_ids = output[0, inputs["input_ids"].shape[1] :]
        continuation = str(tokenizer.decode(new_ids, skip_special_tokens=True))
        console.print(f"[bold]{domain}[/]")
        console.print(Text(prompt, style="dim") + Text(continuation, style="green"))
        console.print()


def merge_and_show(
    folder: Path,
    corpora: dict[str, Corpus],
    window: int,
    clock: Clock,
    *,
    fit_tokens: int,
    finetuning: Mapping[str, Any],
    heldout_chars: int | None = None,
) -> None:
    """The second half of both demos: merge what lies in `folder`, fit, finetune, score it, let it write."""
    experts = {domain: folder / domain for domain in DOMAINS}
    files = write_texts(ROOT / "demo" / "texts", corpora)
    console.rule("[bold]The merge", align="left")
    with clock.part("merge"):
        merge(folder / "seed", experts, folder / "btx")

    console.rule("[bold]The same with everything fitted in closed form, without training", align="left")
    inputs = [folder_fingerprint(folder / name) for name in ("seed", *experts)]
    texts = [corpora[domain].train for domain in DOMAINS]
    fitted_key = fingerprint(inputs, texts, fit_tokens, merge_fitted, package_fingerprint())
    with clock.part("fit") as was_cached:
        build = partial(merge_fitted, folder / "seed", experts, texts=files, tokens=fit_tokens)
        was_cached[0] = cached_output(folder / "fitted", fitted_key, build)

    console.rule("[bold]And finetuned for a minute", align="left")
    with clock.part("finetuning") as was_cached:
        build = partial(finetune, folder / "fitted", texts=files, **finetuning)
        was_cached[0] = cached_output(folder / "trained", fingerprint(fitted_key, finetuning, finetune), build)

    console.rule("[bold]What it is worth", align="left")
    import btx_merge  # noqa: F401  teaches the Auto classes the merged checkpoint's architecture

    tokenizer = AutoTokenizer.from_pretrained(folder / "btx")
    heldout = {domain: "\n\n\n".join(corpora[domain].heldout)[:heldout_chars] for domain in DOMAINS}
    merges = {"merge": folder / "btx", "fitted": folder / "fitted", "trained": folder / "trained"}
    checkpoints = {"seed": folder / "seed", **experts, **merges}
    with clock.part("scores") as was_cached:
        scores, was_cached[0] = score_all(checkpoints, tokenizer, heldout, window, folder / "scores")
    print_scores(scores)
    console.print(conclusion(scores))

    console.rule("[bold]What it writes", align="left")
    with clock.part("continuations"):
        print_continuations(load(folder / "trained"), tokenizer)

    console.rule("[bold]Time", align="left")
    clock.print()


def package_fingerprint() -> str:
    """A key for the code that fits and trains."""
    package = ROOT / "btx_merge"
    files = sorted(package.rglob("*.py"))
    return fingerprint([(str(file.relative_to(package)), file.read_text("utf-8")) for file in files])
