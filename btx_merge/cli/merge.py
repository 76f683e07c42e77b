"""`btx check` and `btx merge`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from btx_merge.cli.options import Device, Json, Overwrite, Quiet, Workers, option
from btx_merge.cli.printing import note, tell_next, warn
from btx_merge.cli.recipe import GivenRecipe, takes_recipe
from btx_merge.errors import InputError, Problem


@takes_recipe
def check_command(
    recipe: GivenRecipe,
    quiet: Quiet = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say all that would be refused, and what the merge would be. Writes nothing."""
    from btx_merge.cli.display import print_check
    from btx_merge.merging.run import check

    _hush(quiet)
    checked = check(recipe.build())
    if json_output:
        print(json.dumps(checked.to_dict(), indent=2))
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

    from btx_merge.cli.display import CountBar, ProgressBar, print_check, print_files, print_report
    from btx_merge.merging.run import Check, check, merge

    if output is None:
        raise InputError([Problem("command", "--output", "missing", "a folder for the merged model")])
    _hush(quiet)
    if dry_run:
        checked = check(recipe.build(), output, overwrite=overwrite, device=device)
        if json_output:
            print(json.dumps(checked.to_dict(), indent=2))
        elif not quiet:
            print_check(checked)
            print_files(checked)
        warn(checked.warnings)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: resumable, one line
    shown = not quiet and sys.stderr.isatty()
    with ProgressBar(shown) as bar, CountBar("fitting", shown) as layers:

        def on_checked(checked: Check) -> None:
            warn(checked.warnings)
            bar.start(sum(job.nbytes for job in checked.plan.jobs))

        report = merge(
            recipe.build(),
            output,
            overwrite=overwrite,
            workers=workers,
            progress=bar.advance,
            on_checked=on_checked,
            on_note=note,
            statistics=statistics,
            device=device,
            on_layer=layers.advance,
        )
    if json_output:
        print(json.dumps(report.to_dict(), indent=2))
    elif not quiet:
        print_report(report)
        tell_next(output)


def _hush(quiet: bool) -> None:
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when huggingface_hub is imported
