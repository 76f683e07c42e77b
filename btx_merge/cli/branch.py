"""`btx branch`: an expert is made of a seed."""

from __future__ import annotations

from typing import Annotated

import typer

from btx_merge.cli.options import Json, Output, Overwrite, Quiet, described
from btx_merge.cli.printing import tell_next
from btx_merge.cli.takes import Given, takes
from btx_merge.cli.training import TRAINER_OPTIONS, Config, Resume, carry_out
from btx_merge.finetuning.recipe import BRANCH_RULES, BranchRecipe
from btx_merge.reporting import pasted


@takes(BranchRecipe, BRANCH_RULES, more=TRAINER_OPTIONS)
def branch_command(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help=described(BranchRecipe, "model"))] = None,
    output: Output = ...,  # type: ignore[assignment]
    config: Config = None,
    given: Given = ...,  # type: ignore[assignment]
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Train a copy of a seed, to become an expert. All of transformers.TrainingArguments are options too."""
    from btx_merge.finetuning.run import branch

    how = (resume, overwrite, quiet, json_output)
    recipe = carry_out(BranchRecipe, branch, context.args, model, output, config, given, *how)
    if recipe:
        name = recipe.data[0].name if len(recipe.data) == 1 else "NAME"
        seed, expert = pasted(recipe.model), pasted(f"{name}={output}")
        tell_next(output, f"btx merge --seed {seed} --expert {expert} -o MERGED")
