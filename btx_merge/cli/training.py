"""`btx train` and `btx branch`: a merged model is finetuned, an expert is made of a seed.

They share a recipe from a file and from flags, and several ranks.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from btx_merge.cli.options import Json, Output, Overwrite, Quiet, described, option
from btx_merge.cli.printing import print_json, result, tell_next
from btx_merge.cli.takes import Given, takes
from btx_merge.cli.terminal import end_like_ctrl_c, terminal
from btx_merge.errors import BTXError, InputError, MergeInterrupted, Problem
from btx_merge.files.bounded_yaml import read_yaml
from btx_merge.finetuning.ranks import own_local_rank, own_rank
from btx_merge.finetuning.recipe import BRANCH_RULES, RULES, BranchRecipe, TrainRecipe, option_names
from btx_merge.options import Options
from btx_merge.reporting import pasted
from btx_merge.texts.references import domain_texts_of

if TYPE_CHECKING:
    from btx_merge.finetuning.run import TrainReport

Recipe = TypeVar("Recipe", TrainRecipe, BranchRecipe)
_Config = Annotated[Path | None, option("YAML file: data, and any option by name; flags win over it.")]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")]
_BETWEEN_RANKS, _WAIT_FOR_THE_FIRST = 1, 10
"""Seconds that a rank gives the first of its host to say why a run ended: by Ctrl-C, or by an error."""


TRAINER = {
    "max_steps": ("INTEGER", "Optimizer steps. Needed."),
    "learning_rate": ("FLOAT", "Highest learning rate, after the warmup [default: 0.0001]."),
    "per_device_train_batch_size": ("INTEGER", "Windows of a micro-batch on each rank [default: 4]."),
    "gradient_accumulation_steps": ("INTEGER", "Micro-batches of a step [default: 1]."),
    "warmup_steps": ("NUMBER", "Steps of the warmup [default: 100, at most a tenth of all]."),
    "lr_scheduler_type": ("NAME", "Course of the learning rate [default: a cosine down to a tenth]."),
    "weight_decay": ("FLOAT", "Weight decay of AdamW [default: 0.1]."),
    "logging_steps": ("NUMBER", "Steps between two lines of losses and expert loads [default: 10]."),
    "eval_steps": ("NUMBER", "Steps between two evaluations [default: only before and after]."),
    "save_steps": ("NUMBER", "Steps between two checkpoints, for --resume [default: 100]."),
    "seed": ("INTEGER", "Seed of all that is random [default: 0]."),
    "report_to": ("NAME", "tensorboard, wandb, ... or none; again for each [default: tensorboard]."),
}
"""The arguments of the Trainer that `--help` names: the form of their values, and what they are."""


def _trainer_option(name: str) -> Any:
    """Return the option of a Trainer's argument. Its value stays text, which transformers reads."""
    metavar, text = TRAINER[name]
    kind: Any = list[str] if name == "report_to" else str
    return Annotated[kind | None, option(text, metavar=metavar)]


_TRAINER_OPTIONS = {name: _trainer_option(name) for name in TRAINER}


@takes(TrainRecipe, RULES, more=_TRAINER_OPTIONS)
def train_command(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help=described(TrainRecipe, "model"))] = None,
    output: Output = ...,  # type: ignore[assignment]
    config: _Config = None,
    given: Given = ...,  # type: ignore[assignment]
    resume: _Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Finetune a merged model. All of transformers.TrainingArguments are options too, as --adam-beta2 0.98."""
    from btx_merge.finetuning.run import train

    how = (resume, overwrite, quiet, json_output)
    if _carry_out(TrainRecipe, train, context.args, model, output, config, given, *how):
        tell_next(output)


@takes(BranchRecipe, BRANCH_RULES, more=_TRAINER_OPTIONS)
def branch_command(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help=described(BranchRecipe, "model"))] = None,
    output: Output = ...,  # type: ignore[assignment]
    config: _Config = None,
    given: Given = ...,  # type: ignore[assignment]
    resume: _Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Train a copy of a seed, to become an expert. All of transformers.TrainingArguments are options too."""
    from btx_merge.finetuning.run import branch

    how = (resume, overwrite, quiet, json_output)
    recipe = _carry_out(BranchRecipe, branch, context.args, model, output, config, given, *how)
    if recipe:
        name = recipe.data[0].name if len(recipe.data) == 1 else "NAME"
        seed, expert = pasted(recipe.model), pasted(f"{name}={output}")
        tell_next(output, f"btx merge --seed {seed} --expert {expert} -o MERGED")


def _carry_out(
    recipe: type[Recipe],
    verb: Callable[..., TrainReport],
    words: Sequence[str],
    model: str | None,
    output: Path,
    config: Path | None,
    given: Given,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    json_output: bool,
) -> Recipe | None:
    """Train by a recipe from a file and from flags; print what was done. Return the recipe where more may be told.

    Args:
        verb: the function, which takes the recipe.
        words: what the command line holds beside known options.
        model: the first word of it.
    """
    end_like_ctrl_c()  # a terminated run says in one line what is kept
    with _the_first_speaks():
        values = read_train_file(config) if config else {}
        if model and model.startswith("--"):  # the model stands in the file, and this is the first further argument
            words = [model, *words]
        elif model:
            values["model"] = model
        values |= given.values | _further_arguments(words)
        built = _recipe_of(recipe, values, str(config or "command"), given)
        with terminal(quiet or own_rank() > 0) as reporter:  # the first speaks for all
            report = verb(built, output, Options(overwrite), reporter, resume=resume)
    if own_rank():
        return None
    if json_output:
        print_json(report)
    elif not quiet:
        result(f"written  {report.output}")
        result(f"took     {report.seconds:.1f} s")
        return built
    return None


@contextmanager
def _the_first_speaks() -> Iterator[None]:
    """Have an error that all ranks of a host meet printed by the first of them.

    The others wait, and the launcher ends them when the first has ended. Where nobody ends a rank, its error is its
    own, and it says so.
    """
    try:
        yield
    except (BTXError, KeyboardInterrupt, OSError) as error:
        if not own_local_rank():
            raise
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        if isinstance(error, (MergeInterrupted, KeyboardInterrupt)):  # all ranks stop together
            time.sleep(_BETWEEN_RANKS)
            raise typer.Exit(130) from None
        time.sleep(_WAIT_FOR_THE_FIRST)
        raise


def read_train_file(file: Path) -> dict[str, Any]:
    """Read the values of a YAML file for `btx train` or `btx branch`; relative paths in it are seen from the file.

    Raises:
        InputError: the file is missing, or is no YAML of this kind.
    """
    values = read_yaml(file, "config", "`data:` and options of the command")
    if "data" in values:
        values["data"] = domain_texts_of(str(file), values["data"], [file.parent])
    if "model" in values:
        values["model"] = _seen_from(file.parent, values["model"])
    if isinstance(sources := values.get("sources"), Mapping):
        values["sources"] = {name: _seen_from(file.parent, model) for name, model in sources.items()}
    return values


def _seen_from(folder: Path, reference: Any) -> Any:
    """Return a model's reference, where it is a path of a folder as it is seen from another one."""
    if isinstance(reference, str) and (folder / reference).is_dir():
        return str((folder / reference).resolve())
    return reference


def _recipe_of(recipe: type[Recipe], values: Mapping[str, Any], origin: str, given: Given) -> Recipe:
    """Return a recipe from plain values: our own options, and arguments of the Trainer.

    Raises:
        InputError: an unknown name, or a value that cannot be meant.
    """
    from btx_merge.finetuning.arguments import check_names

    names: tuple[str, ...] = option_names(recipe)
    own = {name: values[name] for name in ("model", "data", *names) if values.get(name) is not None}
    arguments = {name: value for name, value in values.items() if name not in ("model", "data", *names)}
    problems = check_names(arguments, origin, names)
    try:
        built = recipe(**{"model": "", **own}, arguments=arguments)
    except InputError as error:
        problems += [given.as_typed(replace(problem, source=origin)) for problem in error.problems]
    if problems:
        raise InputError(problems)
    return built


def _further_arguments(words: Sequence[str]) -> dict[str, Any]:
    """Return what is no option of our own by name, such as `--adam-beta2 0.98 --adam_beta1=0.8 --tf32`."""
    out: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, separator, value = word.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            out[name] = value if separator else "true"
        elif not name:
            raise InputError([Problem("command", word, "what is this for?", "options begin with --")])
        else:
            out[name] = word if out[name] == "true" else [*_listed(out[name]), word]
    return out


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]
