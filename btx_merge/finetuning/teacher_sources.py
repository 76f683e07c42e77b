"""The sources that teach a finetuning: found by the model's own recipe, and checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from btx_merge.errors import InputError, Problem
from btx_merge.finetuning.recipe import TrainRecipe
from btx_merge.measuring.sources import open_sources, source_specs
from btx_merge.model.merged import open_merged
from btx_merge.reporting import Reporter
from btx_merge.sources.locate import Located
from btx_merge.sources.source import Source
from btx_merge.sources.tokenizer_files import load_tokenizer

_WITHOUT = "leave out --teacher"


def teacher_sources(
    recipe: TrainRecipe, located: Located, scratch: Callable[[], Path], reporter: Reporter
) -> list[Source]:
    """Open the source of each domain, in the domains' order, without reading weights. None where the recipe has none.

    Args:
        scratch: makes a folder for what peft has to merge itself, which must stay as long as the source.

    Raises:
        InputError: every domain without a source, and every source that cannot be opened or has other tokens.
    """
    if recipe.teacher is None:
        return []
    model = open_merged(located)
    specs = source_specs(model, recipe.sources, _WITHOUT)
    names = [text.name for text in recipe.data]
    remedy = f"Give each domain the name of its source, or {_WITHOUT}."
    problems = [
        Problem("recipe", "data", f"no source {name} to teach it", f"one of {', '.join(specs)}", remedy)
        for name in names
        if name not in specs
    ]
    if problems:
        raise InputError(problems)
    sources, warnings = open_sources(model, recipe.sources, scratch, names, _WITHOUT)
    chosen = [sources[name] for name in names]
    if problems := _token_problems(chosen, located.folder):
        raise InputError(problems)
    for warning in warnings:
        reporter.warn(str(warning))
    return chosen


def _token_problems(sources: list[Source], model: Path) -> list[Problem]:
    """Return which sources could not read the model's windows, or speak of other tokens than it does."""
    ids = load_tokenizer(model).get_vocab()
    problems = []
    for source in sources:
        folder = source.tokenizer_folder
        own = ids if folder is None else load_tokenizer(folder).get_vocab()  # without one, it is the seed's
        if own == ids and max(ids.values()) < source.config["vocab_size"]:
            continue
        other = next((token for token in ids if own.get(token) != ids[token]), None)
        found = f"has other tokens than the merged model, such as {other!r}" if other else "has tokens of its own"
        problems.append(
            Problem(source.name, str(folder), found, "the same tokens in a teacher", f"{_WITHOUT.capitalize()}.")
        )
    return problems
