"""`btx routing`: who gets which tokens, and what each expert is worth."""

from __future__ import annotations

from typing import Annotated, Any

from btx_merge.checkpoints.dtypes import SAFETENSORS_NAMES
from btx_merge.cli.options import Device, Json, Model, Output, Overwrite, Quiet, option
from btx_merge.cli.printing import print_json, tell_next
from btx_merge.cli.terminal import terminal
from btx_merge.options import Options
from btx_merge.texts.references import parse_domain_texts


def routing_command(
    model: Model,
    output: Output,
    data: Annotated[
        list[str] | None, option("Again for every domain: its text, best held out.", metavar="NAME=TEXT")
    ] = None,
    against: Annotated[
        str | None, option("A second merged model to stand beside it, such as the one before a finetuning.")
    ] = None,
    tokens: Annotated[int | None, option("Tokens of each domain that are measured; 0 for all [default: 20000].")] = None,
    window: Annotated[int | None, option("Tokens that the model reads at a time [default: at most 1024].")] = None,
    batch_size: Annotated[int | None, option("Windows that are computed together [default: 8].")] = None,
    dtype: Annotated[
        str | None, option("What is computed in [default: the weights' dtype].", choices=SAFETENSORS_NAMES)
    ] = None,
    ablation: Annotated[
        bool | None,
        option(
            "Whether to measure what each expert is worth, two more passes for each [default: yes].",
            "--ablation/--no-ablation",
        ),
    ] = None,
    page_tokens: Annotated[int | None, option("Tokens that the page shows one by one [default: 20000].")] = None,
    device: Device = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Show who gets which tokens, and what each expert is worth: a page, a picture, and the numbers."""
    from btx_merge.inspecting.recipe import RoutingRecipe
    from btx_merge.inspecting.run import routing

    given: dict[str, Any] = {
        "against": against,
        "tokens": tokens,
        "window": window,
        "batch_size": batch_size,
        "dtype": dtype,
        "ablation": ablation,
        "page_tokens": page_tokens,
    }
    texts = parse_domain_texts("--data", data or [])
    recipe = RoutingRecipe(model, texts, **{name: value for name, value in given.items() if value is not None})
    with terminal(quiet) as reporter:
        report = routing(recipe, output, Options(overwrite, device=device), reporter)
    if json_output:
        print_json(report)
    elif not quiet:
        from btx_merge.cli.display import print_routing

        print_routing(report)
        tell_next(output)
