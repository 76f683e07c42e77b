"""`btx check` and `btx merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from btx_merge.cli.options import Device, Json, Overwrite, Quiet, Statistics, Workers, option
from btx_merge.cli.printing import print_json, tell_next, warn
from btx_merge.cli.recipe import given_recipe
from btx_merge.cli.takes import Given, takes
from btx_merge.cli.terminal import hush, terminal
from btx_merge.errors import InputError, Problem
from btx_merge.merging.recipe import RULES, MergeRecipe
from btx_merge.options import Options

_RecipeFile = Annotated[
    Path | None,
    option(
        "YAML file, or a merged model for the recipe of its merge. Flags win over it.",
        "--recipe",
    ),
]
_takes_recipe = takes(MergeRecipe, RULES, without=("seed_weight",))  # `--weight seed=NUMBER` gives it


@_takes_recipe
def check_command(
    *,
    recipe: _RecipeFile = None,
    given: Given,
    quiet: Quiet = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Check a merge, and show what it would give. Writes nothing."""
    from btx_merge.cli.display import print_check
    from btx_merge.merging.run import check

    hush(quiet)
    checked = check(given_recipe(recipe, given).build())
    if json_output:
        print_json(checked)
    elif not quiet:
        print_check(checked)
    warn(checked.warnings)


@_takes_recipe
def merge_command(
    *,
    recipe: _RecipeFile = None,
    given: Given,
    output: Annotated[Path | None, option("Folder for the merged model.", "--output", "-o")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show what would be written, but write nothing.")
    ] = False,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Only print a recipe file to start from, with all options.")
    ] = False,
    overwrite: Overwrite = False,
    workers: Workers = None,
    statistics: Statistics = None,
    device: Device = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Merge the checkpoints of a recipe into one model."""
    hush(quiet)
    chosen = given_recipe(recipe, given)
    if print_recipe:
        print(chosen.template(), end="")
        return

    from btx_merge.cli.display import print_check, print_files, print_report
    from btx_merge.merging.run import check, merge

    if output is None:
        raise InputError([Problem("command", "--output", "missing", "a folder for the merged model")])
    options = Options(overwrite, workers, device, statistics)
    if dry_run:
        checked = check(chosen.build(), output, options)
        if json_output:
            print_json(checked)
        elif not quiet:
            print_check(checked)
            print_files(checked)
        warn(checked.warnings)
        return
    with terminal(quiet, "merging") as reporter:
        report = merge(chosen.build(), output, options, reporter)
    if json_output:
        print_json(report)
    elif not quiet:
        print_report(report)
        tell_next(output)
