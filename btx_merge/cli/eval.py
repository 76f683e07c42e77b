"""`btx eval`: what a merged model is worth, beside what it was made of; or any other model, alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from btx_merge.cli.options import Device, Json, Overwrite, described, option
from btx_merge.cli.printing import print_json
from btx_merge.cli.takes import Given, takes
from btx_merge.cli.terminal import terminal
from btx_merge.evaluation.recipe import RULES, EvalRecipe
from btx_merge.options import Options


@takes(EvalRecipe, RULES, data="NAME=TEXT")
def eval_command(
    model: Annotated[str, typer.Argument(help=described(EvalRecipe, "model"))],
    given: Given,
    output: Annotated[Path | None, option("Folder for eval.json, eval.md and eval.png.", "--output", "-o")] = None,
    lm_eval_tasks: Annotated[
        Path | None, option("Folder for the same texts as tasks of lm-evaluation-harness.")
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Put table, picture and figures into the model's own card.")
    ] = False,
    device: Device = None,
    overwrite: Overwrite = False,
    quiet: Annotated[bool, option("Print the tables, warnings and errors only.", "--quiet", "-q")] = False,
    json_output: Json = False,
) -> None:
    """Measure a merged model on held-out text, beside the models that it was made of; or any other model, alone."""
    from btx_merge.evaluation.run import evaluate

    recipe = given.build(EvalRecipe, model)
    with terminal(quiet, "measuring") as reporter:
        options = Options(overwrite, device=device)
        report = evaluate(recipe, output, options, reporter, card=card, lm_eval_tasks=lm_eval_tasks)
    if json_output:
        print_json(report)
    else:  # its result is what it says
        from btx_merge.cli.display import print_evaluation

        print_evaluation(report)
