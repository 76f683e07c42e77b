"""`btx eval`: what a merged model is worth, beside what it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from btx_merge.cli.options import Device, Json, Model, Overwrite, Quiet, option, pairs
from btx_merge.cli.printing import print_json
from btx_merge.cli.terminal import terminal
from btx_merge.evaluation.recipe import DTYPES, ROUTINGS, EvalRecipe
from btx_merge.options import Options
from btx_merge.texts.references import parse_domain_texts


def eval_command(
    model: Model,
    data: Annotated[
        list[str] | None,
        option("Again for every text: held-out file, folder, glob or Hub dataset.", metavar="NAME=TEXT"),
    ] = None,
    no_sources: Annotated[bool, typer.Option("--no-sources", help="Leave out the seed and the experts.")] = False,
    source: Annotated[
        list[str] | None, option("Again: where a source of the model's recipe lies now.", metavar="NAME=MODEL")
    ] = None,
    soup: Annotated[bool, typer.Option("--soup", help="Measure the dense mean of the sources too.")] = False,
    against: Annotated[
        list[str] | None, option("Again: a further causal language model.", metavar="NAME=MODEL")
    ] = None,
    routing: Annotated[
        str | None,
        option("domain: once more, with every token sent to its own domain's expert.", choices=ROUTINGS),
    ] = None,
    tokens: Annotated[int | None, option("Tokens of each domain, at most [default: all].")] = None,
    window: Annotated[int | None, option("Tokens of a window [default: 1024, or the model's positions].")] = None,
    batch_size: Annotated[int | None, option("Full windows computed together [default: 4].")] = None,
    dtype: Annotated[
        str | None,
        option(f"{', '.join(DTYPES)} [default: float32 on a CPU, otherwise the model's].", choices=DTYPES),
    ] = None,
    output: Annotated[Path | None, option("Folder for eval.json, eval.md and eval.png.", "--output", "-o")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Put table, picture and figures into the model's own card.")
    ] = False,
    device: Device = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Measure a merged model on held-out text, beside the models that it was made of."""
    from btx_merge.evaluation.run import evaluate

    given: dict[str, Any] = {
        "routing": routing,
        "tokens": tokens,
        "window": window,
        "batch_size": batch_size,
        "dtype": dtype,
    }
    recipe = EvalRecipe(
        model,
        parse_domain_texts("--data", data or []),
        with_sources=not no_sources,
        sources=pairs("--source", source or []),
        soup=soup,
        against=pairs("--against", against or []),
        **{name: value for name, value in given.items() if value is not None},
    )
    with terminal(quiet, "measuring") as reporter:
        report = evaluate(recipe, output, Options(overwrite, device=device), reporter, card=card)
    if json_output:
        print_json(report)
    else:  # its result is what it says
        from btx_merge.cli.display import print_evaluation

        print_evaluation(report)
