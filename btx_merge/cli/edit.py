"""`btx edit`: experts of a merged model added, dropped, replaced, renamed."""

from __future__ import annotations

from btx_merge.cli.options import Device, Json, Model, Output, Overwrite, Quiet, Workers
from btx_merge.cli.printing import print_json, result, tell_next
from btx_merge.cli.takes import Given, add_to_experts, takes
from btx_merge.cli.terminal import terminal
from btx_merge.editing.recipe import RULES, EditRecipe
from btx_merge.errors import InputError
from btx_merge.options import Options


@takes(EditRecipe, RULES, rename="OLD=NEW")
def edit_command(
    model: Model,
    output: Output,
    given: Given,
    device: Device = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Add, drop, replace or rename experts, without a new merge."""
    from btx_merge.cli.display import fit_line
    from btx_merge.editing.run import edit

    values = given.values
    for key in ("add", "replace"):
        values[key] = {name: {"model": new} for name, new in values.get(key, {}).items()}
    if problems := add_to_experts({key: values[key] for key in ("add", "replace")}, given, "new expert"):
        raise InputError(problems)
    recipe = given.build(EditRecipe, model)
    with terminal(quiet, "editing") as reporter:
        report = edit(recipe, output, Options(overwrite, workers, device), reporter)
    if json_output:
        print_json(report)
    elif not quiet:
        result(f"written  {report.output}")
        result(f"experts  {', '.join(report.experts)}")
        result(f"shared   {report.shared}: {report.shared_reason}")
        if report.router_rows:
            result(f"rows     {', '.join(f'{name} {init}' for name, init in report.router_rows.items())}")
        if report.layers:
            result(f"routers  {fit_line(report.layers)}")
        result(f"took     {report.seconds:.1f} s")
        tell_next(output)
