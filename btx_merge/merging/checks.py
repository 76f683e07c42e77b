"""Do these sources belong together? Every reason against it, in one report, before anything is planned.

A check yields problems and raises nothing, so that the next one runs as well; only what all others need (the seed, a
vocabulary) ends the examination early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from btx_merge.architectures.llama import MUST_AGREE
from btx_merge.errors import InputError, Problem, collecting
from btx_merge.merging.fits import REGMEAN_METHODS
from btx_merge.merging.recipe import DIFFERENCE_METHODS, MergeRecipe
from btx_merge.sources.digest import changed_problems
from btx_merge.sources.divergence import Divergence, measure_divergence
from btx_merge.sources.opening import open_each
from btx_merge.sources.side_files import side_file_problems
from btx_merge.sources.source import SEED, ExpertSpec, Source
from btx_merge.sources.tensor_checks import expert_problems, tensor_problems
from btx_merge.sources.text_checks import check_texts, shared_text_warnings
from btx_merge.sources.tokenizer_files import has_speech
from btx_merge.sources.vocabulary import Vocabulary, plan_vocabulary

_NAMED_DIVISORS = range(2, 65)
"""Numbers of chunks that an error suggests: a list that is short enough to read."""
_MEANT_FOR = {
    "density": ("combine", DIFFERENCE_METHODS),
    "scale": ("combine", DIFFERENCE_METHODS),
    "regmean_ridge": ("combine", REGMEAN_METHODS),
    "num_chunks": ("expert_mode", ("split",)),
    "router_ridge": ("router_init", ("ridge",)),
}
"""Options that mean something with some values of another option only, and those values."""


@dataclass(frozen=True)
class Examined:
    """Sources that belong together, and what was found out about them."""

    sources: tuple[Source, ...]
    """The seed first."""
    vocabulary: Vocabulary
    """All their tokens, and which row of which source is whose."""
    divergence: tuple[Divergence, ...]
    """How far each expert is from the seed."""
    warnings: tuple[Problem, ...]
    """What deserves a look, though it stops no merge."""


def examine(recipe: MergeRecipe, scratch: Callable[[], Path]) -> Examined:
    """Open all sources and compare them with the seed, the first of them.

    A source that cannot be opened keeps none of the others from being looked at, nor does one check keep the
    next: only what a check needs must be right.

    Args:
        scratch: makes a folder for what peft has to merge itself.

    Raises:
        InputError: every problem of every source.
    """
    specs = {SEED: ExpertSpec(recipe.seed, recipe.seed_weight), **recipe.experts}
    opened, problems = open_each(specs, None, scratch)
    sources = list(opened.values())
    problems += changed_problems(sources, recipe.resolved.get("sources", {}))
    if sources and sources[0].name == SEED:
        problems += _recipe_problems(recipe, sources[0])
        for source in sources:
            if source.name == recipe.tokenizer_source:
                problems += side_file_problems(source.name, *source.folders)
        problems += _fit_problems(recipe, sources)
    untie = recipe.untie or recipe.has_own_head
    examined = examine_sources(sources, problems, untie=untie, allow_unrelated=recipe.allow_unrelated)
    of_texts = shared_text_warnings(recipe.domain_text.values())
    return replace(examined, warnings=(*_idle_warnings(recipe, sources), *of_texts, *examined.warnings))


def examine_sources(
    sources: Sequence[Source], problems: list[Problem], *, untie: bool, allow_unrelated: bool
) -> Examined:
    """Compare sources that are open with the seed among them.

    Args:
        problems: why others could not be opened, and what else is wrong so far.
        untie: whether tied and untied sources may be mixed.
        allow_unrelated: whether a source that does not seem to have grown from the seed is a warning only.

    Raises:
        InputError: those problems, and every problem of every source.
    """
    problems = list(problems)
    seed = next((source for source in sources if source.name == SEED), None)
    if seed is None:
        raise InputError(problems)  # there is nothing to compare the others with
    sound = []  # sources whose shapes are right: only those can be compared number by number
    for source in sources:
        own = [*config_problems(source, seed), *tensor_problems(source), *_tying_problems(source, seed, untie)]
        problems += own
        if not own:
            sound.append(source)
    vocabulary: Vocabulary | None = None
    divergence: list[Divergence] = []
    unrelated: list[Problem] = []
    identical: list[Problem] = []
    if seed in sound:
        with collecting(problems):
            vocabulary = plan_vocabulary(sound)
        divergence, unrelated, identical = measure_divergence(sound)
    if not allow_unrelated:
        problems += unrelated
    if problems or vocabulary is None:
        raise InputError(problems)
    warnings = (*_warnings(sources), *unrelated, *identical)
    return Examined(tuple(sources), vocabulary, tuple(divergence), warnings)


def _fit_problems(recipe: MergeRecipe, sources: Sequence[Source]) -> list[Problem]:
    """Check what a fit needs: texts that can be read, and a tokenizer."""
    folders = [source.tokenizer_folder for source in sources if source.tokenizer_folder]
    chat = next((source for source in sources if source.name == recipe.tokenizer_source), None)
    speech = None  # the folder that the result has its chat template from, where the source could be opened
    if chat:
        # its own chat template, then that of its tokenizer, then any other source's
        places = [*filter(has_speech, chat.folders), chat.tokenizer_folder, *folders]
        speech = next((folder for folder in places if folder), None)
    problems = check_texts(recipe.domain_text.values(), speech)
    if recipe.is_fitted and not folders:
        remedy = "Copy the tokenizer's files into the seed's folder."
        problems.append(Problem(SEED, "tokenizer", "no source has one", "one, to fit on text", remedy))
    return problems


def config_problems(source: Source, seed: Source) -> Iterator[Problem]:
    """Find keys of config.json in which a source differs from the seed, or which nobody can merge."""
    keys = list(MUST_AGREE)
    if source.config["rope_parameters"]["rope_type"] not in ("default", "linear", "llama3"):
        keys.append("max_position_embeddings")  # this kind of rotary embedding is computed from it
    for key in keys:
        if source.config[key] != seed.config[key]:
            yield from _differing(source.name, f"config.json: {key}", source.config[key], seed.config[key])
    yield from expert_problems(source)


def _tying_problems(source: Source, seed: Source, untie: bool) -> Iterator[Problem]:
    """Check that embedding and head are one tensor in this source if and only if they are in the seed."""
    tied, seed_tied = source.config["tie_word_embeddings"], seed.config["tie_word_embeddings"]
    if tied != seed_tied and not untie:
        remedy = "Give --untie (`untie: true`) to untie them all: a tied source's head is its embedding."
        where = "config.json: tie_word_embeddings"
        found = repr(tied)
        if source.base and not tied:
            found = "False: the adapter changes embedding and head apart, or one of them alone"
        yield Problem(source.name, where, found, f"{seed_tied!r} as in the seed", remedy)


def _idle_warnings(recipe: MergeRecipe, sources: Sequence[Source]) -> Iterator[Problem]:
    """Yield which options change nothing here."""
    for key, (other, values) in _MEANT_FOR.items():
        given, chosen = getattr(recipe, key), getattr(recipe, other)
        if given != getattr(MergeRecipe, key) and chosen not in values:
            found = f"{given} changes nothing with {other}: {chosen}"
            yield Problem("recipe", key, found, f"{other}: {' or '.join(values)}")
    if recipe.untie and not recipe.has_own_head and all(source.config["tie_word_embeddings"] for source in sources):
        remedy = "For a head of its own give --head fitted (`head: fitted`) and what it is fitted on, or leave it out."
        found = "changes nothing: all sources are tied, and so is the result"
        yield Problem("recipe", "untie", found, "", remedy)


def _differing(name: str, where: str, found: Any, wanted: Any) -> Iterator[Problem]:
    """Report a key that differs: one problem, or one for each differing key inside it (`rope_parameters`)."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                yield from _differing(name, f"{where}.{key}", found.get(key), wanted.get(key))
        return
    remedy = "Experts must be grown from the seed without changing its architecture."
    yield Problem(name, where, repr(found), f"{wanted!r} as in the seed", remedy)


def _recipe_problems(recipe: MergeRecipe, seed: Source) -> Iterator[Problem]:
    """Check the values of the recipe that only make sense for some seeds."""
    width = seed.config["intermediate_size"]
    chunks = recipe.num_chunks if recipe.expert_mode == "split" else 1
    if recipe.expert_mode == "blend":
        chunks = len(recipe.experts) + recipe.seed_expert
    if width % chunks:
        found = f"intermediate_size {width} cannot be cut into {chunks} equal chunks"
        key = "num_chunks" if recipe.expert_mode == "split" else "expert_mode: blend"
        divisors = [number for number in _NAMED_DIVISORS if width % number == 0]
        expected = f"a divisor of it, such as {', '.join(map(str, divisors))}"
        yield Problem("recipe", key, found, expected, "Choose another number of chunks, or expert_mode: whole.")


def _warnings(sources: Sequence[Source]) -> Iterator[Problem]:
    """Return what deserves a look, though it stops no merge. The seed is the first of the sources."""
    seed = sources[0]
    if not any(source.tokenizer_folder for source in sources):
        remedy = "The result has none either: copy a tokenizer's files into the seed's folder."
        yield Problem(SEED, "tokenizer", "no source has one", "", remedy)
    for source in sources:
        yield from source.warnings
    for source in sources[1:]:
        length, wanted = source.config["max_position_embeddings"], seed.config["max_position_embeddings"]
        if length != wanted:
            where = "config.json: max_position_embeddings"
            remedy = f"The result keeps {wanted}."
            yield Problem(source.name, where, str(length), f"{wanted} as in the seed", remedy)
