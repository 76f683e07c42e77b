"""`btx fit`: the routers of a merged model, in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from btx_merge.cli.options import Device, Json, Model, Output, Overwrite, Quiet, lists, option
from btx_merge.cli.printing import print_json, result, tell_next
from btx_merge.cli.terminal import terminal
from btx_merge.fitting.recipe import FIT_THROUGH, ROUTER_FITS
from btx_merge.options import Options
from btx_merge.texts.references import parse_domain_texts


def fit_command(
    model: Model,
    output: Output,
    method: Annotated[str | None, option(f"{', '.join(ROUTER_FITS)} [default: ridge].", choices=ROUTER_FITS)] = None,
    domain_text: Annotated[
        list[str] | None,
        option("Again for every expert: text of its domain.", metavar="NAME=TEXT[:WEIGHT]"),
    ] = None,
    prompt: Annotated[
        list[str] | None, option("Again: a line typical of an expert, for prompts.", metavar="NAME=LINE")
    ] = None,
    domain_tokens: Annotated[int | None, option("Tokens read of each domain [default: 200000].")] = None,
    router_ridge: Annotated[float | None, option("Relative penalty [default: 0.001].")] = None,
    fit_through: Annotated[
        str | None,
        option(f"{', '.join(FIT_THROUGH)}: what leads to the next layer [default: expert].", choices=FIT_THROUGH),
    ] = None,
    statistics: Annotated[
        Path | None, option("Folder for what the texts tell: kept there, or taken from there.")
    ] = None,
    device: Device = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Fit the routers of a merged model in closed form, without training."""
    from btx_merge.cli.display import fit_line
    from btx_merge.fitting.recipe import FitRecipe
    from btx_merge.fitting.run import fit

    given: dict[str, Any] = {
        "method": method,
        "domain_text": parse_domain_texts("--domain-text", domain_text or []),
        "prompts": lists("--prompt", prompt or []),
        "domain_tokens": domain_tokens,
        "router_ridge": router_ridge,
        "fit_through": fit_through,
    }
    recipe = FitRecipe(model, **{name: value for name, value in given.items() if value is not None})
    with terminal(quiet) as reporter:
        report = fit(recipe, output, Options(overwrite, device=device, statistics=statistics), reporter)
    if json_output:
        print_json(report)
    elif not quiet:
        result(f"written  {report.output}")
        if report.layers:
            result(f"routers  {fit_line(report.layers)}")
        result(f"took     {report.seconds:.1f} s")
        tell_next(output)
