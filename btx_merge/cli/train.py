"""`btx train`: a recipe from a file and from flags, then `finetuning.train`."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from btx_merge.cli.options import Json, Overwrite, Quiet, option
from btx_merge.cli.printing import print_json, result, tell_next
from btx_merge.cli.terminal import end_like_ctrl_c, terminal
from btx_merge.errors import BTXError, InputError, MergeInterrupted, Problem
from btx_merge.files.bounded_yaml import read_yaml
from btx_merge.finetuning.launched import own_local_rank, own_rank
from btx_merge.finetuning.recipe import LORA_TARGETS, OPTION_NAMES, TRAIN_MODES, TrainRecipe
from btx_merge.options import Options
from btx_merge.texts.references import domain_texts_of, parse_domain_texts

_BETWEEN_RANKS, _WAIT_FOR_THE_FIRST = 1, 10
"""Seconds that a rank gives the first of its host to say why a run ended: by Ctrl-C, or by an error."""


def train_command(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Folder or org/name[@revision] of a merged model.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the result.")] = ...,  # type: ignore
    config: Annotated[Path | None, option("YAML file: data, and any option by name; flags win over it.")] = None,
    data: Annotated[
        list[str] | None,
        option("Again for every text: file, folder, glob or Hub dataset.", metavar="NAME=TEXT[:WEIGHT]"),
    ] = None,
    train: Annotated[str | None, option(f"{', '.join(TRAIN_MODES)} [default: shared].", choices=TRAIN_MODES)] = None,
    max_length: Annotated[int | None, option("Tokens of a window [default: 1024, or the model's].")] = None,
    holdout: Annotated[float | None, option("Part of each domain that is scored instead [default: 0.02].")] = None,
    shuffle: Annotated[int | None, option("Windows among which the next is drawn [default: 256].")] = None,
    router_grad: Annotated[
        str | None, option("sparse or dense [default: the model's].", choices=("sparse", "dense"))
    ] = None,
    router_aux_loss_coef: Annotated[
        float | None, option("Coefficient of the balancing loss [default: the model's].")
    ] = None,
    router_aux_loss_scope: Annotated[
        str | None,
        option("global_batch or micro_batch [default: global_batch].", choices=("global_batch", "micro_batch")),
    ] = None,
    lora_target: Annotated[
        str | None, option(f"{', '.join(LORA_TARGETS)} [default: shared].", choices=LORA_TARGETS)
    ] = None,
    lora_r: Annotated[int | None, option("Rank [default: 16].")] = None,
    lora_alpha: Annotated[float | None, option("Scale, times the rank [default: 32].")] = None,
    fsdp_size: Annotated[int | None, option("Ranks that parameters are sharded over [default: 1].")] = None,
    ep_size: Annotated[int | None, option("Ranks that experts are spread over [default: 1].")] = None,
    max_steps: Annotated[str | None, option("Optimizer steps.", metavar="INTEGER")] = None,
    learning_rate: Annotated[str | None, option("Peak [default: 1e-4].", metavar="FLOAT")] = None,
    per_device_train_batch_size: Annotated[str | None, option("Windows [default: 4].", metavar="INTEGER")] = None,
    gradient_accumulation_steps: Annotated[
        str | None, option("Micro-batches of a step [default: 1].", metavar="INTEGER")
    ] = None,
    warmup_steps: Annotated[
        str | None, option("[default: 100, at most a tenth of the steps].", metavar="NUMBER")
    ] = None,
    lr_scheduler_type: Annotated[str | None, option("[default: cosine down to a tenth].", metavar="NAME")] = None,
    weight_decay: Annotated[str | None, option("[default: 0.1].", metavar="FLOAT")] = None,
    logging_steps: Annotated[str | None, option("[default: 10].", metavar="NUMBER")] = None,
    eval_steps: Annotated[str | None, option("[default: before and after].", metavar="NUMBER")] = None,
    save_steps: Annotated[str | None, option("[default: 100].", metavar="NUMBER")] = None,
    seed: Annotated[str | None, option("[default: 0].", metavar="INTEGER")] = None,
    report_to: Annotated[
        list[str] | None, option("tensorboard, wandb, ..., none [default: tensorboard].", metavar="NAME")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Finetune a merged model. All of transformers.TrainingArguments are options too, as --adam-beta2 0.98."""
    given = {key: value for key, value in locals().items() if value is not None}
    end_like_ctrl_c()  # a terminated run says in one line what is kept
    with _the_first_speaks():
        values = read_train_file(config) if config else {}
        flags = {name: given[name] for name in (*OPTION_NAMES, *_SHOWN_ARGUMENTS) if name in given}
        further = context.args
        if model and model.startswith("--"):  # the model stands in the file, and this is the first further argument
            further = [model, *further]
        elif model:
            values["model"] = model
        values |= flags | _further_arguments(further)
        if data:
            values["data"] = parse_domain_texts("--data", data)
        recipe = recipe_of(values, str(config or "command"))

        from btx_merge.finetuning.run import train as finetune

        with terminal(quiet or own_rank() > 0) as reporter:  # the first speaks for all
            report = finetune(recipe, output, Options(overwrite), reporter, resume=resume)
    if own_rank():
        return
    if json_output:
        print_json(report)
    elif not quiet:
        result(f"written  {report.output}")
        result(f"took     {report.seconds:.1f} s")
        tell_next(output)


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


_SHOWN_ARGUMENTS = (
    *("max_steps", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "warmup_steps"),
    *("lr_scheduler_type", "weight_decay", "logging_steps", "eval_steps", "save_steps", "seed", "report_to"),
)


def read_train_file(file: Path) -> dict[str, Any]:
    """The values of a YAML file for `btx train`; relative paths in it are seen from the file.

    Raises:
        InputError: the file is missing, or is no YAML of this kind.
    """
    values = read_yaml(file, "train", "`data:` and options of btx train")
    if "data" in values:
        values["data"] = domain_texts_of(str(file), values["data"], [file.parent])
    reference = values.get("model")
    if isinstance(reference, str) and (file.parent / reference).is_dir():
        values["model"] = str((file.parent / reference).resolve())
    return values


def recipe_of(values: Mapping[str, Any], origin: str) -> TrainRecipe:
    """A recipe from plain values: our own options, and arguments of the Trainer.

    Raises:
        InputError: an unknown name, or a value that cannot be meant.
    """
    from btx_merge.finetuning.arguments import check_names

    own = {name: values[name] for name in ("model", "data", *OPTION_NAMES) if values.get(name) is not None}
    arguments = {name: value for name, value in values.items() if name not in ("model", "data", *OPTION_NAMES)}
    problems = check_names(arguments, origin, OPTION_NAMES)
    try:
        recipe = TrainRecipe(**{"model": "", **own}, arguments=arguments)
    except InputError as error:
        problems += [replace(problem, source=origin) for problem in error.problems]
    if problems:
        raise InputError(problems)
    return recipe


def _further_arguments(words: list[str]) -> dict[str, Any]:
    """`--adam-beta2 0.98 --adam_beta1=0.8 --tf32`: what is no option of our own, by name."""
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
