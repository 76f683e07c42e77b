"""The sources of a merged model, found by its own recipe."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

from btx_merge.errors import InputError, Problem
from btx_merge.model.merged import MergedModel
from btx_merge.model.records import RECIPE_FILE, anchor_sources, read_record
from btx_merge.sources.digest import changed_problems
from btx_merge.sources.locate import is_folder
from btx_merge.sources.opening import open_each
from btx_merge.sources.source import SEED, ExpertSpec, Source, as_spec

_WITHOUT = "--no-sources"


def source_specs(model: MergedModel, moved: Mapping[str, str], without: str = _WITHOUT) -> dict[str, ExpertSpec]:
    """Return the models that a merged one was made of, by its own recipe: the seed, then the experts.

    Args:
        moved: source to where it lies now, for those that are not where the recipe says.
        without: what a user can do without sources, for the remedies.

    Raises:
        InputError: the model has no recipe, or none of the sources has the name of one that has moved.
    """
    folder = model.located.folder.resolve()
    where, values = str(folder / RECIPE_FILE), read_record(folder)
    if not values.get("seed"):
        remedy = f"Copy it there from the model that this one was made of, or {without}."
        raise InputError([Problem("model", where, "no recipe, which would name the sources", "", remedy)])
    values = anchor_sources(values, [folder, folder.parent])
    experts = {name: as_spec(name, spec) for name, spec in (values.get("experts") or {}).items()}
    specs = {SEED: ExpertSpec(values["seed"]), **experts}
    known = f"one of {', '.join(specs)}"
    if unknown := [Problem("command", "--source", f"no source {name}", known) for name in moved if name not in specs]:
        raise InputError(unknown)
    return {name: replace(spec, model=moved.get(name, spec.model)) for name, spec in specs.items()}


def open_sources(
    model: MergedModel,
    moved: Mapping[str, str],
    scratch: Callable[[], Path],
    only: Collection[str] | None = None,
    without: str = _WITHOUT,
) -> tuple[dict[str, Source], list[Problem]]:
    """Open the models that a merged one was made of, without reading weights, the seed first.

    Returns with them warnings: sources that are not what was merged.

    Args:
        moved, without: see `source_specs`.
        scratch: makes a folder for what peft has to merge itself.
        only: names of the sources that are wanted beside the seed, which may be an adapter's base. None: all.

    Raises:
        InputError: every source that cannot be opened.
    """
    specs = source_specs(model, moved, without)
    if only is not None:
        specs = {name: spec for name, spec in specs.items() if name in {SEED, *only}}
    sources, problems = open_each(specs, None, scratch)
    if problems:
        raise InputError([_with_ways_out(problem, specs, without) for problem in problems])
    digests = (read_record(model.located.folder).get("resolved") or {}).get("sources")
    changed = changed_problems(sources.values(), digests if isinstance(digests, Mapping) else {})
    return sources, [replace(problem, remedy="Give the one that was merged by --source.") for problem in changed]


def _with_ways_out(problem: Problem, specs: Mapping[str, ExpertSpec], without: str) -> Problem:
    """Add to what can be done about a source that its place came from a recipe, and that it can be done without."""
    model, option = specs[problem.source].model, f"--source {problem.source}=MODEL"
    is_path = "/" not in model or model.startswith(("/", ".", "~"))  # otherwise the Hub's, whose answer says more
    if is_path and not is_folder(model):
        return replace(problem, remedy=f"Give {option} where it lies now, or {without}.")
    otherwise = f"{option}, another copy of it, or {without}."
    return replace(problem, remedy=f"{problem.remedy} Or give {otherwise}" if problem.remedy else f"Give {otherwise}")
