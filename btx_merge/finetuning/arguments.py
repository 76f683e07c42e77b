"""`TrainingArguments` by the names that people know, from flags (text) or from a file (values)."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, cast

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from btx_merge.errors import InputError, Problem

DEFAULTS: dict[str, Any] = {
    # the paper's: section 4.1
    "learning_rate": 1e-4,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine_with_min_lr",
    # ours, for one small machine: the paper's batch is 4 M tokens
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "logging_steps": 10,
    "save_steps": 100,
    "save_total_limit": 2,
    "seed": 0,
    "disable_tqdm": True,
    "ddp_find_unused_parameters": False,  # experts are fused: a step that leaves one out still uses the tensor
    "dataloader_pin_memory": False,  # windows are small, and without a GPU torch warns of it
}
_MIN_LEARNING_RATE = {"min_lr_rate": 0.1}
"""The cosine ends at a tenth of the peak, as in the paper (section 4.1)."""
_WARMUP_STEPS = 100
"""The paper's; or a tenth of the steps, if that is less."""

_AT_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    "seed": 0,
}
"""What transformers does not check before it computes."""

_DECIDED = {  # what they would ask for is asked for in another way, or cannot be had here
    "output_dir": "Give --output.",
    "resume_from_checkpoint": "Give --resume.",
    "num_train_epochs": "Give --max-steps: a mixture by weights has no end.",
    "fsdp": "Give --fsdp-size.",
    "fsdp_config": "Give --fsdp-size.",
    "deepspeed": "Give --fsdp-size.",
    "remove_unused_columns": "",
    "accelerator_config": "",
    "dataloader_num_workers": "Texts are read in the process that trains.",
    "dataloader_drop_last": "",
    "ignore_data_skip": "",
    "group_by_length": "Windows are of one length.",
    "load_best_model_at_end": "The result is that of the last step.",
    "push_to_hub": "Push the finished folder.",
    "label_names": "",
    "auto_find_batch_size": "",
    "eval_on_start": "It is always done where a part is held out.",
}


def known_names() -> list[str]:
    """Return the names of all arguments that may be given."""
    names = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    return [name for name in names if name not in _DECIDED]


def check_names(names: Iterable[str], origin: str, more: Iterable[str] = ()) -> list[Problem]:
    """Return a problem for each unknown name, with the nearest known one.

    Args:
        more: names of other options that the same place may hold.
    """
    problems = []
    known = [*known_names(), *more]
    for name in names:
        if name in known:
            continue
        if name in _DECIDED:
            problems.append(Problem(origin, name, "cannot be chosen", "", _DECIDED[name]))
        else:
            near = difflib.get_close_matches(name, known, 1)
            remedy = f"Did you mean {near[0]}?" if near else "Known are those of transformers.TrainingArguments."
            problems.append(Problem(origin, name, "unknown name", "", remedy))
    return problems


def training_arguments(values: Mapping[str, Any], folder: str) -> TrainingArguments:
    """Build the arguments with our defaults. Text is read as on transformers' own command lines.

    Raises:
        InputError: an unknown name, or a value that is not of the argument's kind; all of them.
    """
    problems = check_names(values, "command")
    typed: dict[str, Any] = {}
    parser = _Parser(cast(Any, TrainingArguments))
    for name, value in values.items():
        if value is None or any(problem.where == name for problem in problems):
            continue
        if name == "report_to" and isinstance(value, (list, tuple)):
            typed[name] = [*map(str, value)]  # of which transformers' parser takes one only
            continue
        try:
            typed[name] = getattr(parser.parse_args(_words(name, value)), name)
        except _NotUnderstood as error:
            reason = str(error).partition(": ")[2] or str(error)
            problems.append(Problem("command", name, f"{value!r}", "", f"({reason})"))
    steps = typed.get("max_steps")
    if not problems and (steps is None or steps < 1):
        found = "missing" if steps is None else f"{steps}"
        problems.append(Problem("command", "max_steps", found, "at least 1", "Give --max-steps."))
    for name, least in _AT_LEAST.items():
        if typed.get(name, least) < least:
            problems.append(Problem("command", name, f"{typed[name]}", f"at least {least}"))
    if problems:
        raise InputError(problems)
    settings = {**DEFAULTS, **_defaults_by(typed), **typed}
    if not torch.accelerator.is_available():
        settings["use_cpu"] = True  # without it, accelerate does not let ranks on a CPU meet
    try:
        arguments = TrainingArguments(
            output_dir=folder,
            remove_unused_columns=False,
            accelerator_config={"dispatch_batches": False},  # every rank reads, and keeps its own
            **settings,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise InputError([Problem("command", "arguments", " ".join(str(error).split()))]) from error
    if problems := _report_problems(arguments.report_to or ()):
        raise InputError(problems)
    return arguments


def _report_problems(names: Iterable[str]) -> list[Problem]:
    """Return which of the places that losses are to be reported to are unknown, or not installed."""
    known, installed = INTEGRATION_TO_CALLBACK, get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    problems = []
    for name in names:
        if name not in known:
            problems.append(Problem("command", "report_to", repr(name), f"none, or one of {', '.join(sorted(known))}"))
        elif name not in installed and name != "flyte":  # of which transformers does not tell
            problems.append(
                Problem("command", "report_to", f"{name} is not installed", "", "Install it, or say none.")
            )
    return problems


def _defaults_by(typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults that depend on other arguments."""
    steps = typed["max_steps"]
    out: dict[str, Any] = {"warmup_steps": min(_WARMUP_STEPS, steps // 10), "eval_steps": steps}
    if "lr_scheduler_type" not in typed:
        out["lr_scheduler_kwargs"] = _MIN_LEARNING_RATE
    if "report_to" not in typed:
        out["report_to"] = "tensorboard"
    return out


class _NotUnderstood(Exception):
    """What argparse would have ended the process with."""


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _NotUnderstood(message)


def _words(name: str, value: Any) -> list[str]:
    """Write a value as it would stand on a command line."""
    if isinstance(value, (list, tuple)):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, Mapping) else str(value)]
