"""`btx routing`: who gets which tokens, and what each expert is worth."""

from __future__ import annotations

from btx_merge.cli.options import Device, Json, Model, Output, Overwrite, Quiet
from btx_merge.cli.printing import print_json, tell_next
from btx_merge.cli.takes import Given, takes
from btx_merge.cli.terminal import terminal
from btx_merge.inspecting.recipe import RULES, RoutingRecipe
from btx_merge.options import Options


@takes(RoutingRecipe, RULES, data="NAME=TEXT")
def routing_command(
    model: Model,
    output: Output,
    given: Given,
    device: Device = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Show who gets which tokens, and what each expert is worth: a page, a picture, and the numbers."""
    from btx_merge.inspecting.run import routing

    recipe = given.build(RoutingRecipe, model)
    with terminal(quiet, "measuring") as reporter:
        report = routing(recipe, output, Options(overwrite, device=device), reporter)
    if json_output:
        print_json(report)
    elif not quiet:
        from btx_merge.cli.display import print_routing

        print_routing(report)
        tell_next(output)
