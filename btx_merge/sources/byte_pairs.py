"""A comparison of two byte-pair tokenizers with the same merges in different orders: do they read texts alike?

Converters of one tokenizer.model write merges of equal rank in different orders, next to each other or thousands of
places apart. The order matters only where two merges want the same token, as ("a", "b") and ("b", "c") do in "abc".
So texts are encoded with both orders: those in which such merges meet, and random ones.
"""

from __future__ import annotations

import json
import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

Pair = tuple[str, str]

_MEETINGS = 1_000
"""Meetings of two merges that are tried; more take longer than the rest of a check."""
_EACH = 3
"""Meetings that are tried of one merge where many have moved."""
_RANDOM_TEXTS = 1_000
"""Texts of random tokens, for what the meetings leave out."""
_OPTIONS = (
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
)


def read_differently(
    rules: Mapping[str, Any], vocabulary: Mapping[str, int], merges: Sequence[Pair], others: Sequence[Pair]
) -> tuple[str, list[str], list[str]] | None:
    """Return the first text that is read differently with the merges in another order, and both readings.

    Args:
        rules: tokenizer.json of the first tokenizer. Its vocabulary and its merges are not looked at.
        others: `merges` in another order.

    Raises:
        ValueError: the `tokenizers` library cannot build a tokenizer of them.
    """
    try:
        one, other = (_build(rules, vocabulary, pairs) for pairs in (merges, others))
    except Exception as error:  # `tokenizers` raises nothing more exact
        raise ValueError(str(error)) from error
    texts = list(_texts(one, list(vocabulary), meetings(merges, others)))
    for text, before, after in zip(texts, one.encode_batch(texts), other.encode_batch(texts), strict=True):
        if before.tokens != after.tokens:
            return text, before.tokens, after.tokens
    return None


def needs_ignored_merges(rules: Mapping[str, Any], vocabulary: Mapping[str, int], merges: Sequence[Pair]) -> bool:
    """Return whether a token is read whole where `ignore_merges` is true only: no merges of its own lead to it."""
    try:
        models = ({**rules["model"], "ignore_merges": value} for value in (False, True))
        one, other = (_build({**rules, "model": model}, vocabulary, merges) for model in models)
    except Exception:  # `tokenizers` raises nothing more exact
        return True
    decode = one.decoder.decode if one.decoder else "".join
    texts = [decode([token]) for token in vocabulary]
    pairs = zip(one.encode_batch(texts), other.encode_batch(texts), strict=True)
    return any(before.ids != after.ids for before, after in pairs)


def meetings(merges: Sequence[Pair], others: Sequence[Pair]) -> Iterator[tuple[str, str, str]]:
    """Find three tokens of which the first two and the last two can be merged, by one order this, by the other that.

    >>> list(meetings([("a", "b"), ("x", "y"), ("b", "c")], [("b", "c"), ("a", "b"), ("x", "y")]))
    [('a', 'b', 'c')]
    """
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    other_ranks = {pair: rank for rank, pair in enumerate(others)}
    moved = _moved(sorted(ranks, key=ranks.__getitem__), other_ranks)
    random.Random(0).shuffle(moved)
    by_left, by_right = defaultdict(list), defaultdict(list)
    for left, right in ranks:
        by_left[left].append(right)
        by_right[right].append(left)
    for pair in moved:
        first, last = pair
        met = [((left, first), pair) for left in by_right[first]] + [(pair, (last, right)) for right in by_left[last]]
        found = 0
        for one, other in met:
            if (ranks[one] < ranks[other]) != (other_ranks[one] < other_ranks[other]):
                yield (*one, other[1])
                found += 1
                if found == max(_EACH, _MEETINGS // len(moved)):
                    break


def _moved(ordered: Sequence[Pair], other_ranks: Mapping[Pair, int]) -> list[Pair]:
    """Return the fewest merges without which the others have the same order in both lists.

    They are those outside a longest increasing run of ranks, which patience sorting finds.
    """
    lowest: list[int] = []  # the lowest rank at which a run of each length can end
    length = []  # of the longest run that ends at each merge
    for pair in ordered:
        rank = other_ranks[pair]
        place = bisect_left(lowest, rank)
        lowest[place : place + 1] = [rank]
        length.append(place)
    moved = []
    wanted, above = len(lowest) - 1, len(other_ranks)
    for pair, place in zip(reversed(ordered), reversed(length), strict=True):
        if place == wanted and other_ranks[pair] < above:
            wanted, above = wanted - 1, other_ranks[pair]
        else:
            moved.append(pair)
    return moved


def _build(rules: Mapping[str, Any], vocabulary: Mapping[str, int], merges: Sequence[Pair]) -> Any:
    """Return a tokenizer with these rules. Reading all from one JSON text would take several times as long."""
    from tokenizers import Tokenizer, models

    options = {name: rules["model"][name] for name in _OPTIONS if rules["model"].get(name)}
    empty = {**rules["model"], "vocab": {}, "merges": []}
    built = Tokenizer.from_str(json.dumps({**rules, "model": empty, "truncation": None, "padding": None}))
    built.model = models.BPE(dict(vocabulary), list(merges), **options)
    return built


def _texts(tokenizer: Any, tokens: list[str], met: Iterator[tuple[str, str, str]]) -> Iterator[str]:
    """Return the texts to be read: each meeting alone, between line breaks and among random tokens; random tokens."""
    decode = tokenizer.decoder.decode if tokenizer.decoder else "".join
    chance = random.Random(0)
    for pieces in islice(met, _MEETINGS):
        text = decode(list(pieces))
        yield text
        yield f"\n{text}\n"
        yield decode([*chance.choices(tokens, k=2), *pieces, *chance.choices(tokens, k=2)])
    for _ in range(_RANDOM_TEXTS):
        yield decode(chance.choices(tokens, k=8))
