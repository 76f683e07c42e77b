"""The models of an evaluation, found and checked before any of them is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from btx_merge.checkpoints.dtypes import TORCH_NAMES, config_dtype
from btx_merge.errors import InputError, Problem, collecting
from btx_merge.evaluation.recipe import DTYPES, EvalRecipe
from btx_merge.evaluation.report import AGAINST, MODEL, ROUTED, SOUP, SOURCE
from btx_merge.files.folder import file_problems, read_json
from btx_merge.files.placing import check_target
from btx_merge.measuring.windows import DEFAULT_WINDOW
from btx_merge.model.merged import MergedModel, open_merged
from btx_merge.model.records import is_blended
from btx_merge.sources.locate import SMALL_FILES, Located, locate
from btx_merge.sources.source import Source
from btx_merge.sources.tokenizer_files import no_tokenizer
from btx_merge.sources.vocabulary import plan_vocabulary
from btx_merge.texts.readers import is_installed
from btx_merge.texts.windows import length_problems, positions_of


@dataclass(frozen=True, eq=False)
class Measured:
    """The model that an evaluation is of, opened without reading weights."""

    located: Located
    config: Mapping[str, Any]
    """Of a merged model, that of a dense Llama in it."""
    merged: MergedModel | None
    """None for a model of another kind, which stands alone."""

    @property
    def dtype(self) -> str:
        """torch's name of the dtype of its weights; float32 where a config does not say."""
        if self.merged:
            return TORCH_NAMES[self.merged.dtype]
        stored = config_dtype(self.config)
        return stored if stored in DTYPES else "float32"


@dataclass(frozen=True, eq=False)
class Entry:
    """A model to be measured, not loaded yet."""

    name: str
    kinds: tuple[str, ...]
    """A row for each."""
    tokenizer: Path
    """The folder of its tokenizer."""
    folders: tuple[Path, ...]
    """Where it lies, and an adapter's base."""
    load: Callable[[Any, Any], Any]
    """Takes a dtype and a device of torch."""


def open_measured(reference: str) -> Measured:
    """Open the model that an evaluation is of.

    Raises:
        InputError: no model; or a merged one with something wrong.
    """
    located = locate("model", reference)
    if (located.folder / "adapter_config.json").exists() and not (located.folder / "config.json").exists():
        remedy = "Give its base, and it beside that: --against NAME=ADAPTER."
        raise InputError([Problem("model", "adapter_config.json", "a PEFT adapter", "a whole model", remedy)])
    if not _is_other(located.folder):
        merged = open_merged(located)
        return Measured(located, merged.dense_config, merged)
    if problems := [replace(problem, source="model") for problem in file_problems(located.folder, SMALL_FILES)]:
        raise InputError(problems)
    return Measured(located, read_json(located.folder / "config.json"), None)


def _is_other(folder: Path) -> bool:
    """Return whether a folder has a model that is no merged one. What cannot be read is left to who opens it."""
    try:
        return read_json(folder / "config.json").get("model_type") != "btx"
    except (InputError, OSError):
        return False


def entries_of(
    recipe: EvalRecipe, model: Measured, window: int, scratch: Callable[[], Path]
) -> tuple[list[Entry], list[Problem]]:
    """Find all models of an evaluation, the one that it is of first; return with them what should be looked at twice.

    Raises:
        InputError: every model that cannot be measured.
    """
    from btx_merge.measuring.models import load_folder

    problems: list[Problem] = []
    warnings: list[Problem] = []
    folder = model.located.folder
    kinds = (MODEL, ROUTED) if recipe.routing else (MODEL,)
    load = partial(load_folder, model.located)
    entries = [Entry("merged" if model.merged else "model", kinds, folder, (folder,), load)]
    if model.merged and not recipe.no_sources:
        with collecting(problems):
            of_sources, warnings = _source_entries(recipe, model.merged, scratch)
            entries += of_sources
    taken = [entry.name for entry in entries]
    for name, reference in recipe.against.items():
        if name in taken:
            found, expected = f"the name {name}, which another row has", "a name of its own"
            problems.append(Problem("recipe", "against", found, expected))
        with collecting(problems, name):
            entries.append(_other(name, reference, window))
    if problems:
        raise InputError(problems)
    return entries, warnings


def _source_entries(
    recipe: EvalRecipe, model: MergedModel, scratch: Callable[[], Path]
) -> tuple[list[Entry], list[Problem]]:
    from btx_merge.measuring.models import load_mean, load_source
    from btx_merge.measuring.sources import open_sources

    def entry(source: Source) -> Entry:
        tokenizer = source.tokenizer_folder or model.located.folder
        return Entry(source.name, (SOURCE,), tokenizer, source.folders, partial(load_source, source))

    sources, warnings = open_sources(model, recipe.sources, scratch)
    entries = [entry(source) for source in sources.values()]
    if recipe.soup:
        each = list(sources.values())
        plan_vocabulary(each)  # says now what cannot be averaged
        entries.append(Entry("soup", (SOUP,), model.located.folder, (), partial(load_mean, each)))
    return entries, warnings


def _other(name: str, reference: str, window: int) -> Entry:
    """Return a model that is compared with, of any kind.

    Raises:
        InputError: no model, or one that has fewer positions than a window.
    """
    from btx_merge.measuring.models import load_folder

    located = locate(name, reference)
    problems = list(file_problems(located.folder, SMALL_FILES))
    problems = problems or no_tokenizer(name, located.folder)
    if problems:
        raise InputError(problems)
    if not (located.folder / "adapter_config.json").exists():
        positions = positions_of(read_json(located.folder / "config.json"))
        if positions is not None and positions < window:
            remedy = f"Give --window {positions}, for all models."
            raise InputError([Problem(name, "config.json", f"{positions} positions", f"at least {window}", remedy)])
    return Entry(name, (AGAINST,), located.folder, (located.folder,), partial(load_folder, located))


def ensemble_of(recipe: EvalRecipe, entries: Sequence[Entry]) -> list[Entry]:
    """Return the sources that are experts of Branch-Train-Merge: those with text.

    Raises:
        InputError: a text of no source, or more experts for a context than there are.
    """
    names = [text.name for text in recipe.btm_text]
    sources = [entry for entry in entries if entry.kinds == (SOURCE,)]
    chosen = [entry for entry in sources if entry.name in names]
    problems = []
    for name in names:
        if name not in [entry.name for entry in sources]:
            expected = f"one of {', '.join(entry.name for entry in sources)}"
            problems.append(Problem("recipe", "btm_text", f"no source {name}", expected))
    if recipe.btm and max(recipe.btm) > len(names):
        found, expected = f"{max(recipe.btm)}", f"at most {len(names)}, the experts with text"
        problems.append(Problem("recipe", "btm", found, expected))
    if recipe.btm and not is_installed("sklearn"):
        remedy = "pip install '.[btm]' in a checkout of btx-merge."
        problems.append(Problem("command", "scikit-learn", "is not installed", "", remedy))
    if problems:
        raise InputError(problems)
    return chosen


def window_of(recipe: EvalRecipe, config: Mapping[str, Any]) -> int:
    """Return the tokens of a window.

    Raises:
        InputError: more than the model has positions.
    """
    if problems := length_problems("window", recipe.window, config):
        raise InputError(problems)
    return recipe.window or min(DEFAULT_WINDOW, positions_of(config) or DEFAULT_WINDOW)


def sources_problems(recipe: EvalRecipe, model: MergedModel | None) -> list[Problem]:
    """Return which wishes need sources or experts that the model does not have."""
    if model is None:
        found, remedy = "given, and the model was not merged", "Leave it out, or give a merged model."
        wishes = ("sources", "soup", "routing", "btm")
        return [Problem("recipe", wish, found, "", remedy) for wish in wishes if getattr(recipe, wish)]
    if recipe.routing and is_blended(model.located.folder):
        found, expected = "domain, and experts that are each a part of every source", "an expert of each domain"
        return [Problem("recipe", "routing", found, expected, "Leave --routing out.")]
    remedy = "Give each domain the name of its expert, or leave --routing out."
    expected = f"one of {', '.join(model.domains)}"
    names = [text.name for text in recipe.data if recipe.routing and text.name not in model.domains]
    return [Problem("recipe", "routing", f"domain, and no expert {name}", expected, remedy) for name in names]


def target_problems(targets: Sequence[Path], overwrite: bool) -> list[Problem]:
    """Return why nothing can be written to the folders of report and tasks."""
    problems: list[Problem] = []
    for target in targets:
        with collecting(problems):
            check_target(target, overwrite)
    for target, other in pairwise(targets):  # there are two at most
        if target.is_relative_to(other) or other.is_relative_to(target):
            found, expected = f"overlaps with {target}, the folder of the report", "a folder for the tasks alone"
            problems.append(Problem("command", "--lm-eval-tasks", found, expected, "Give another folder."))
    return problems


def overlap_problems(targets: Sequence[Path], folders: Mapping[str, Sequence[Path]]) -> list[Problem]:
    """Return which models a result would remove: it takes the place of all that its folder holds.

    Args:
        folders: of each model, by its name.
    """
    problems = []
    for target in targets:
        for name, places in folders.items():
            if any(place.resolve().is_relative_to(target) for place in places):
                found = f"is the folder of {name}, or holds it"
                problems.append(Problem("output", str(target), found, "", "Give another folder."))
    return problems


def hub_problem(located: Located) -> list[Problem]:
    """Return why no card can be written beside a model."""
    if located.repo_id is None:
        return []
    found, remedy = f"{located.repo_id}, a model of the Hub's", "Download it into a folder of your own first."
    return [Problem("command", "--card", found, "a folder whose card may be changed", remedy)]
