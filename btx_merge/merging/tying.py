"""Is a source's head its embedding, and may those be mixed of which some are tied in this way?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from btx_merge.architectures.llama import EMBEDDING, HEAD
from btx_merge.checkpoints.layout import BLOCK_BYTES, portions
from btx_merge.errors import Problem
from btx_merge.merging.recipe import MergeRecipe
from btx_merge.sources.source import Source


def head_of_tied_problems(source: Source) -> Iterator[Problem]:
    """Check the head that a tied checkpoint holds all the same: it must be the embedding once more.

    transformers ignores it at load, so other numbers there would silently be lost. Reads both tensors.
    """
    head, embedding = source.tensors[HEAD], source.tensors.get(EMBEDDING)
    same = embedding is not None and (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if same and embedding is not None and head.shape:
        for start, stop in portions(0, head.shape[0], max(1, head.row_bytes), BLOCK_BYTES):
            ours = head.read_rows(start, stop).copy()  # the next read uses the same buffer
            if not np.array_equal(ours, embedding.read_rows(start, stop)):
                same = False
                break
    if not same:
        found = f"{HEAD} differs from the embedding although tie_word_embeddings is true"
        remedy = "Say false in its config.json if the head is meant, or delete the tensor if it is not."
        yield Problem(source.name, head.file.name, found, "the same numbers, or no such tensor", remedy)


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
