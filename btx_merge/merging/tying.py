"""May sources be mixed of which some have their embedding for a head?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from btx_merge.errors import Problem
from btx_merge.merging.recipe import MergeRecipe
from btx_merge.sources.source import Source


def tying_problems(source: Source, seed: Source, untie: bool) -> Iterator[Problem]:
    """Check that embedding and head are one tensor in this source if and only if they are in the seed."""
    tied, seed_tied = source.config["tie_word_embeddings"], seed.config["tie_word_embeddings"]
    if tied != seed_tied and not untie:
        remedy = "Give --untie (`untie: true`) to untie them all: a tied source's head is its embedding."
        where = "config.json: tie_word_embeddings"
        found = repr(tied)
        if source.base and not tied:
            found = "False: the adapter changes embedding and head apart, or one of them alone"
        yield Problem(source.name, where, found, f"{seed_tied!r} as in the seed", remedy)


def untie_warnings(recipe: MergeRecipe, sources: Sequence[Source]) -> Iterator[Problem]:
    """Yield that `untie` changes nothing, where it does not: it only lets sources be mixed."""
    if recipe.untie and not recipe.has_own_head and all(source.config["tie_word_embeddings"] for source in sources):
        remedy = "For a head of its own give --head fitted (`head: fitted`) and what it is fitted on, or leave it out."
        found = "changes nothing: all sources are tied, and so is the result"
        yield Problem("recipe", "untie", found, "", remedy)
