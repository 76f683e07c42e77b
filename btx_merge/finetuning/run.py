"""Finetuning a merged model: what to train, on which texts, with which settings of `transformers.Trainer`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from btx_merge.errors import InputError, MergeInterrupted, Problem
from btx_merge.files.changes import ReadFiles
from btx_merge.files.disk_errors import disk_error
from btx_merge.files.folder import read_json
from btx_merge.files.placing import remove, repair
from btx_merge.finetuning.launched import own_rank
from btx_merge.finetuning.work_folder import SUFFIX, begin, folder_problems, held, what_is_kept
from btx_merge.model.opening import find_model
from btx_merge.reporting import short
from btx_merge.sources.digest import model_digest
from btx_merge.sources.locate import Located
from btx_merge.sources.text_checks import check_texts
from btx_merge.texts.readers import is_installed
from btx_merge.texts.references import EXTRA, DomainText, as_domain_texts
from btx_merge.values import ABOVE_ZERO, Rule, at_least, one_of, value_problems

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
        problems = value_problems(self, _VALUES)
        try:
            object.__setattr__(self, "data", as_domain_texts(self.data, "data"))
            if not self.data:
                problems.append(Problem("recipe", "data", "missing", "at least one domain, --data NAME=REFERENCE"))
        except InputError as error:
            problems += error.problems
        if not isinstance(self.arguments, Mapping) or not all(isinstance(name, str) for name in self.arguments):
            problems.append(Problem("recipe", "arguments", short(self.arguments), "`name: value`"))
        if self.train == "lora" and not problems and self.fsdp_size * self.ep_size > 1:
            found, remedy = "lora on sharded parameters", "Copies of the model do: without --fsdp-size and --ep-size."
            problems.append(Problem("recipe", "train", found, "", remedy))
        elif not problems and self.fsdp_size % self.ep_size:
            found, remedy = f"{self.ep_size} with fsdp_size {self.fsdp_size}", "Give --fsdp-size, the number of ranks."
            problems.append(Problem("recipe", "ep_size", found, "a divisor of fsdp_size", remedy))
        if problems:
            raise InputError(problems)


_VALUES: dict[str, Rule] = {
    "model": ("a merged checkpoint", bool),
    "train": one_of(TRAIN_MODES),
    "max_length": at_least(2),
    "holdout": ("in [0, 0.5]", lambda value: 0 <= value <= 0.5),
    "shuffle": at_least(1),
    "router_grad": one_of(("sparse", "dense")),
    "router_aux_loss_coef": at_least(0),
    "router_aux_loss_scope": one_of(("global_batch", "micro_batch")),
    "lora_target": one_of(LORA_TARGETS),
    "lora_r": at_least(1),
    "lora_alpha": ABOVE_ZERO,
    "fsdp_size": at_least(1),
    "ep_size": at_least(1),
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
        from btx_merge.finetuning.session import Run

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
