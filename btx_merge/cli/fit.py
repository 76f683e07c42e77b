"""`btx fit`: the routers of a merged model, on text or prompts."""

from __future__ import annotations

from btx_merge.cli.options import Device, Json, Model, Output, Overwrite, Quiet, Statistics
from btx_merge.cli.printing import print_json, result, tell_next
from btx_merge.cli.takes import Given, takes
from btx_merge.cli.terminal import terminal
from btx_merge.fitting.recipe import RULES, FitRecipe
from btx_merge.options import Options


@takes(FitRecipe, RULES)
def fit_command(
    model: Model,
    output: Output,
    given: Given,
    statistics: Statistics = None,
    device: Device = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Fit a merged model's routers on text or prompts, without training."""
    from btx_merge.cli.display import fit_line
    from btx_merge.fitting.run import fit
    from btx_merge.model.held_out import fit_advice

    recipe = given.build(FitRecipe, model)
    with terminal(quiet) as reporter:
        report = fit(recipe, output, Options(overwrite, device=device, statistics=statistics), reporter)
    if json_output:
        print_json(report)
    elif not quiet:
        result(f"written  {report.output}")
        if report.layers:
            result(f"routers  {fit_line(report.layers)}")
        if report.losses:
            result(f"lost     {fit_advice(report.losses)}")
        result(f"took     {report.seconds:.1f} s")
        tell_next(output)
