"""Each option is described once: `--help` says what the field behind an option says, and that names the values."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields

import pytest
import typer.main
from typer.testing import CliRunner

from btx_merge import BranchRecipe, EditRecipe, ExpertSpec, FitRecipe, MergeRecipe, Options, RoutingRecipe, TrainRecipe
from btx_merge.cli.app import app
from btx_merge.editing.recipe import RULES as EDIT_RULES
from btx_merge.evaluation.recipe import RULES as EVAL_RULES
from btx_merge.evaluation.recipe import EvalRecipe
from btx_merge.finetuning.arguments import DEFAULTS
from btx_merge.finetuning.recipe import RULES as TRAIN_RULES
from btx_merge.fitting.recipe import RULES as FIT_RULES
from btx_merge.inspecting.recipe import RULES as ROUTING_RULES
from btx_merge.merging.recipe import RULES as MERGE_RULES
from btx_merge.values import choices, field_descriptions

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OF_A_MERGE = (ExpertSpec, MergeRecipe)
CLASSES = {"merge": OF_A_MERGE, "check": OF_A_MERGE, "fit": (FitRecipe,), "edit": (ExpertSpec, EditRecipe)}
CLASSES |= {"train": (TrainRecipe,), "branch": (BranchRecipe,), "eval": (EvalRecipe,), "routing": (RoutingRecipe,)}
WITHOUT_FLAG = {
    "merge": {"seed_weight", "resolved", "model"},  # --weight seed=..; for a merge to write; --expert NAME=MODEL
    "check": {"seed_weight", "resolved", "model"},
    "branch": {"arguments"},
    "train": {"arguments"},  # each is an option of its own
}
WITHOUT_FIELD = {
    "merge": {"recipe", "output", "dry_run", "print_recipe"},
    "check": {"recipe"},
    "fit": {"output"},
    "edit": {"output"},
    "eval": {"output", "card", "lm_eval_tasks"},
    "routing": {"output"},
    "train": {
        *("output", "config", "resume", "max_steps", "learning_rate", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "warmup_steps", "lr_scheduler_type", "weight_decay", "logging_steps"),
        *("eval_steps", "save_steps", "seed", "report_to"),
    },
}
WITHOUT_FIELD["branch"] = WITHOUT_FIELD["train"]
OF_ALL = {"quiet", "json_output"}


def packed(text: str) -> str:
    """Return a text without its spaces, for `--help` breaks lines even within an option's name."""
    return "".join(text.split())


@pytest.mark.parametrize("verb", CLASSES)
def test_help_says_what_the_fields_say(verb: str) -> None:
    done = CliRunner().invoke(app, [verb, "--help"])
    assert done.exit_code == 0
    shown = packed(done.output)
    options = {param.name for param in COMMANDS[verb].params}
    described = {item.name: (cls, item) for cls in (Options, *CLASSES[verb]) for item in fields(cls)}
    of_recipes = {name for name, (cls, _) in described.items() if cls is not Options}
    assert of_recipes - options == WITHOUT_FLAG.get(verb, set())
    assert options - described.keys() - OF_ALL == WITHOUT_FIELD[verb]
    for name in described.keys() & options:
        cls, item = described[name]
        before, *names_and_after = re.split(r"`[^`]+`", packed(field_descriptions(cls)[name]))
        pattern = "[a-zA-Z0-9_./@-]+".join(map(re.escape, [before, *names_and_after]))  # flags for fields
        if item.default not in (MISSING, None, False, ()):
            default = "yes" if item.default is True else str(item.default)
            pattern += rf"(Mayberepeated\.)?\[default:{re.escape(default)}\]"
        assert re.search(pattern, shown), f"{name}: {pattern}"


@pytest.mark.parametrize("verb", ["export", "extract"])
def test_an_export_is_described_by_the_options_of_all_verbs(verb: str) -> None:
    helps = {param.name: param.help for param in COMMANDS[verb].params}
    for item in fields(Options):
        if item.name in helps:
            assert helps[item.name].startswith(field_descriptions(Options)[item.name])
    assert {"overwrite", "workers", "max_shard_size"} <= helps.keys()


RULES = {MergeRecipe: MERGE_RULES, FitRecipe: FIT_RULES, TrainRecipe: TRAIN_RULES, EditRecipe: EDIT_RULES}
RULES[EvalRecipe] = EVAL_RULES
RULES[RoutingRecipe] = ROUTING_RULES


@pytest.mark.parametrize("recipe", RULES)
def test_a_description_names_the_values_that_are_allowed(recipe: type) -> None:
    """In the words of the message for another value: the range, or each of the names."""
    for name, rule in RULES[recipe].items():
        text = field_descriptions(recipe)[name]
        for allowed in choices(rule) or [rule[0]]:
            is_said = re.search(rf"(?<!\w){re.escape(allowed)}(?!\w)", text, re.IGNORECASE)
            assert is_said, f"{recipe.__name__}.{name} does not say {allowed}: {text}"


def test_a_flag_names_the_field_that_another_one_needs() -> None:
    """On a command line it is a flag, too."""
    (text,) = (param.help for param in COMMANDS["merge"].params if param.name == "router_init")
    assert "fitted on --domain-text; prompts: fitted on --prompt." in text
    (text,) = (param.help for param in COMMANDS["train"].params if param.name == "ep_size")
    assert "a divisor of --fsdp-size." in text


def test_the_defaults_of_the_trainer_are_those_that_help_names() -> None:
    helps = {param.name: param.help for param in COMMANDS["train"].params}
    shown = {"learning_rate", "per_device_train_batch_size", "weight_decay", "logging_steps", "save_steps", "seed"}
    assert {name for name in DEFAULTS if name in helps} == {*shown, "lr_scheduler_type"}
    for name in shown:
        assert f"[default: {DEFAULTS[name]}]" in helps[name]


def test_a_wrong_value_is_reported_under_its_flag() -> None:
    for words, line in (
        (["fit", "m", "--domain-tokens", "3"], "command: --domain-tokens: 3; expected at least 64"),
        (["edit", "m", "--drop", "a", "--router-std", "-1"], "command: --router-std: -1.0; expected above 0"),
        (
            ["train", "m", "--data", "a=b", "--max-steps", "1", "--lora-r", "0"],
            "command: --lora-r: 0; expected at least 1",
        ),
    ):
        done = CliRunner().invoke(app, [*words, "-o", "nowhere"])
        assert (done.exit_code, done.stderr) == (2, f"error: {line}\n")


def test_all_values_of_a_wrong_form_are_reported_together() -> None:
    done = CliRunner().invoke(app, ["check", "--expert", "a", "--weight", "b=much", "--domain-text", "c"])
    lines = [line.split(";")[0] for line in done.stderr.splitlines()]
    assert lines == [
        "error: command: --expert: a",
        "error: command: --weight: b=much",
        "error: command: --domain-text: c",
    ]
