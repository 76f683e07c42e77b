"""Finetuning a merged model: what to train, on which texts, with which settings of `transformers.Trainer`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from btx_merge.disk_errors import disk_error
from btx_merge.errors import InputError, MergeInterrupted, Problem
from btx_merge.folder_files import read_json
from btx_merge.hub import Located
from btx_merge.model_folder import find_model
from btx_merge.placing import remove, repair
from btx_merge.ranks import own_rank
from btx_merge.reading import ReadFiles
from btx_merge.source_digest import model_digest
from btx_merge.text_checks import check_texts
from btx_merge.textfiles import is_installed
from btx_merge.texts import EXTRA, DomainText, as_domain_texts
from btx_merge.train_folder import SUFFIX, begin, folder_problems, held, what_is_kept

TRAIN_MODES = ("routers", "shared", "all", "lora")
LORA_TARGETS = {"routers": "routers", "shared": "routers + shared", "experts": "experts"}
Show = Callable[[str], None]


@dataclass(frozen=True)
class TrainRecipe:
    """Everything that determines a finetuning.

    Raises:
        InputError: a value that cannot be meant; all of them in one error.
    """

    model: str
    """The merged checkpoint: a folder, `org/name` or `org/name@revision`."""
    data: tuple[DomainText, ...] = ()
    """The mixture. Also a mapping: name to a reference, several, or `text:` and `weight:`."""
    train: str = "shared"
    """routers; shared (routers and everything that was averaged: the paper's variant with frozen experts); all; lora.
    """
    max_length: int | None = None
    """Tokens of a window; 1024, or what the model can take where that is less."""
    holdout: float = 0.02
    """Part of each domain's documents that is not trained on but scored, in [0, 0.5]."""
    shuffle: int = 256
    """Windows of each domain among which the next one is drawn, at least 1."""
    router_grad: str | None = None
    """sparse or dense, see `BTXConfig`; the model's where not given."""
    router_aux_loss_coef: float | None = None
    """Coefficient of the balancing loss; the model's where not given."""
    router_aux_loss_scope: str = "global_batch"
    """global_batch: balance over all ranks and accumulated micro-batches; micro_batch: over each."""
    lora_target: str = "shared"
    """lora: routers, shared (routers and attention) or experts."""
    lora_r: int = 16
    """lora: rank."""
    lora_alpha: float = 32
    """lora: what is learned is scaled by lora_alpha / lora_r."""
    fsdp_size: int = 1
    """Ranks that the parameters are sharded over (FSDP2): 1, or all of them."""
    ep_size: int = 1
    """Ranks that the experts are spread over; divides fsdp_size."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of `transformers.TrainingArguments`, by name. `max_steps` must be there."""

    def __post_init__(self) -> None:
        problems: list[Problem] = []
        try:
            object.__setattr__(self, "data", as_domain_texts(self.data, "data"))
        except InputError as error:
            problems += error.problems
        for name, (expected, is_fine) in _VALUES.items():
            value = getattr(self, name)
            if not is_fine(value):
                problems.append(Problem("recipe", name, "missing" if value in ("", ()) else f"{value!r}", expected))
        if self.train == "lora" and not problems and self.fsdp_size * self.ep_size > 1:
            found, remedy = "lora on sharded parameters", "Copies of the model do: without --fsdp-size and --ep-size."
            problems.append(Problem("recipe", "train", found, "", remedy))
        elif not problems and self.fsdp_size % self.ep_size:
            found, remedy = f"{self.ep_size} with fsdp_size {self.fsdp_size}", "Give --fsdp-size, the number of ranks."
            problems.append(Problem("recipe", "ep_size", found, "a divisor of fsdp_size", remedy))
        if problems:
            raise InputError(problems)


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {  # what is expected, and whether a value is that
    "model": ("a merged checkpoint", lambda value: bool(value) and isinstance(value, str)),
    "data": ("at least one domain, --data NAME=REFERENCE", bool),
    "train": (f"one of {', '.join(TRAIN_MODES)}", lambda value: value in TRAIN_MODES),
    "max_length": ("at least 2", lambda value: value is None or _is_count(value, 2)),
    "holdout": ("in [0, 0.5]", lambda value: _is_number(value) and value <= 0.5),
    "shuffle": ("at least 1", _is_count),
    "router_grad": ("sparse or dense", lambda value: value in (None, "sparse", "dense")),
    "router_aux_loss_coef": ("a number of at least 0", lambda value: value is None or _is_number(value)),
    "router_aux_loss_scope": (
        "global_batch or micro_batch",
        lambda value: value in ("global_batch", "micro_batch"),
    ),
    "lora_target": (f"one of {', '.join(LORA_TARGETS)}", lambda value: value in LORA_TARGETS),
    "lora_r": ("at least 1", _is_count),
    "lora_alpha": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "fsdp_size": ("at least 1", _is_count),
    "ep_size": ("at least 1", _is_count),
}
OPTION_NAMES = tuple(item.name for item in fields(TrainRecipe) if item.name not in ("model", "data", "arguments"))


@dataclass(frozen=True)
class TrainReport:
    """What a finetuning did."""

    output: Path
    entry: Mapping[str, Any]
    """What btx_recipe.yaml says about it."""
    history: tuple[Mapping[str, Any], ...]
    """What was logged, step by step."""
    seconds: float


def train(
    recipe: TrainRecipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    show: Show | None = None,
    warn: Show | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> TrainReport:
    """Finetunes a merged model and writes the result, a complete model or a LoRA adapter, into the folder `output`.

    Meanwhile checkpoints lie in `OUTPUT.btx-training`, which goes when the result is complete.

    Args:
        resume: whether to go on where an interrupted run of the same recipe stopped.
        overwrite: whether `output` may be replaced; that happens when the result is complete.
        show: called with the lines that a person follows the run by.
        warn: called with what deserves a look.
        on_step: called with the steps that are done and all steps, first before a step was done.

    Raises:
        InputError: a reason not to train, or a text that cannot be read; checkpoints of the run are kept.
        MergeError: the disk refused; checkpoints are kept.
        MergeInterrupted: Ctrl-C or SIGTERM. Between the first step and the last, the step in work was finished and
            saved; the error's text names what is kept.
    """
    began = time.perf_counter()
    target = Path(output).expanduser().resolve()
    work = target.with_name(target.name + SUFFIX)
    located = _check(recipe, target, work, resume, overwrite)
    show, warn = show or (lambda line: None), warn or (lambda line: None)
    read = ReadFiles.of_folder("model", located.stamps)
    try:
        from btx_merge.train_run import Run  # torch and transformers

        run = Run(recipe, located, work, show, warn, on_step)
        with held(work) if run.is_main else nullcontext():
            if run.is_main:
                repair(target, warn)
                begin(work, asdict(recipe), run.settings, resume, model_digest(located.folder))
            run.wait()
            run.train(resume)
            entry = run.finish(target, overwrite, read)
            if run.is_main:
                remove(work, warn)
            run.wait()
    except (MergeInterrupted, KeyboardInterrupt):
        raise MergeInterrupted(f"Interrupted. {what_is_kept(work)}") from None
    except Exception as error:
        if changes := read.changes():
            raise InputError(changes) from error
        if isinstance(error, OSError):
            raise disk_error(error, work, what_is_kept(work)) from error
        raise
    return TrainReport(target, entry, tuple(run.history), time.perf_counter() - began)


def _check(recipe: TrainRecipe, target: Path, work: Path, resume: bool, overwrite: bool) -> Located:
    """All that can be known before anything heavy is imported. The model's folder."""
    located, of_model = find_model(recipe.model, target, overwrite)
    problems = check_texts(recipe.data, located.folder if located else None)
    needed = ["accelerate", "matplotlib", *([] if "report_to" in recipe.arguments else ["tensorboard"])]
    missing = [package for package in needed if not is_installed(package)]
    problems += [Problem("command", package, "is not installed", "", f"{EXTRA}.") for package in missing]
    problems += of_model
    problems += folder_problems(work, resume, own_rank() == 0)
    if located:
        problems += _config_problems(recipe, read_json(located.folder / "config.json"))
    if problems or located is None:
        raise InputError(problems)
    return located


def _config_problems(recipe: TrainRecipe, config: Mapping[str, Any]) -> list[Problem]:
    """Return what the recipe asks for and a model of this config.json cannot do."""
    problems = []
    if recipe.train == "lora" and config.get("router_selection_bias"):
        found, remedy = "true: training moves the bias, and an adapter cannot hold it", "Train routers, shared or all."
        problems.append(Problem("model", "config.json: router_selection_bias", found, "false for a lora", remedy))
    if (experts := config["num_local_experts"]) % recipe.ep_size:
        found, expected = f"{recipe.ep_size} for {experts} experts", "as many experts on each rank"
        problems.append(Problem("recipe", "ep_size", found, expected, "Give another --ep-size."))
    return problems


def tools() -> dict[str, str]:
    """What a run was made with."""
    return {name: version(name) for name in ("btx-merge", "torch", "transformers", "accelerate", "peft")}
