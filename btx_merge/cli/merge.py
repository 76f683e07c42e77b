"""`btx check` and `btx merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from btx_merge.cli.options import Device, Json, Overwrite, Quiet, Workers, option
from btx_merge.cli.printing import print_json, tell_next, warn
from btx_merge.cli.recipe import GivenRecipe, takes_recipe
from btx_merge.cli.terminal import hush, terminal
from btx_merge.errors import InputError, Problem
from btx_merge.options import Options


@takes_recipe
def check_command(
    recipe: GivenRecipe,
    quiet: Quiet = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say all that would be refused, and what the merge would be. Writes nothing."""
    from btx_merge.cli.display import print_check
    from btx_merge.merging.run import check

    hush(quiet)
    checked = check(recipe.build())
    if json_output:
        print_json(checked)
    elif not quiet:
        print_check(checked)
    warn(checked.warnings)


@takes_recipe
def merge_command(
    recipe: GivenRecipe,
    output: Annotated[Path | None, option("Folder for the merged model.", "--output", "-o")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say what would be written; write nothing.")
    ] = False,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print a recipe file with all options to start from, no more.")
    ] = False,
    overwrite: Overwrite = False,
    workers: Workers = None,
    statistics: Annotated[
        Path | None, option("Folder for what a fit learns of the texts: kept there, or taken from there.")
    ] = None,
    device: Device = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Merge the checkpoints of a recipe into one model."""
    if print_recipe:
        print(recipe.template(), end="")
        return

    from btx_merge.cli.display import print_check, print_files, print_report
    from btx_merge.merging.run import check, merge

    if output is None:
        raise InputError([Problem("command", "--output", "missing", "a folder for the merged model")])
    hush(quiet)
    options = Options(overwrite, workers, device, statistics)
    if dry_run:
        checked = check(recipe.build(), output, options)
        if json_output:
            print_json(checked)
        elif not quiet:
            print_check(checked)
            print_files(checked)
        warn(checked.warnings)
        return
    with terminal(quiet, "merging") as reporter:
        report = merge(recipe.build(), output, options, reporter)
    if json_output:
        print_json(report)
    elif not quiet:
        print_report(report)
        tell_next(output)
