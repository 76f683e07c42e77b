"""`btx train`: a merged model is finetuned."""

from __future__ import annotations

from typing import Annotated

import typer

from btx_merge.cli.options import Json, Output, Overwrite, Quiet, described
from btx_merge.cli.printing import tell_next
from btx_merge.cli.takes import Given, takes
from btx_merge.cli.training import TRAINER_OPTIONS, Config, Resume, carry_out
from btx_merge.finetuning.recipe import RULES, TrainRecipe


@takes(TrainRecipe, RULES, more=TRAINER_OPTIONS)
def train_command(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help=described(TrainRecipe, "model"))] = None,
    output: Output = ...,  # type: ignore[assignment]
    config: Config = None,
    given: Given = ...,  # type: ignore[assignment]
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Finetune a merged model. All of transformers.TrainingArguments are options too, as --adam-beta2 0.98."""
    from btx_merge.finetuning.run import train

    how = (resume, overwrite, quiet, json_output)
    if carry_out(TrainRecipe, train, context.args, model, output, config, given, *how):
        tell_next(output)
