"""Windows of tokens, packed from documents. Any tokenizer of transformers will do; nothing of it is imported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from btx_merge.errors import InputError, Problem

_CHARS_AT_ONCE = 1_000_000
"""Characters of a group that is encoded in one call: enough work for the tokenizer's threads, little memory."""


def packed_windows(
    documents: Iterable[str], tokenizer: Any, length: int, source: str = "data"
) -> Iterator[tuple[list[int], list[int]]]:
    """Pack documents, one after the other, into windows of `length` tokens: (input_ids, position_ids).

    Positions begin at 0 with each document, and with each window. From them transformers knows, where there is no
    attention mask and no cache, that no document may look at another. A document has the special tokens that the
    tokenizer gives it, and ends with eos where the tokenizer has one. What does not fill the last window is left out,
    unless there is no other: that one is shorter.

    Args:
        source: the domain's name, for the error.

    Raises:
        InputError: the documents have no token at all.
    """
    ids: list[int] = []
    positions: list[int] = []
    is_first = True
    for tokens in _tokenized(documents, tokenizer):
        begin = 0  # of what is left of the document; one that is longer than a window goes on in the next
        while begin < len(tokens):
            part = tokens[begin : begin + length - len(ids)]
            ids += part
            positions += range(len(part))
            begin += len(part)
            if len(ids) == length:
                yield ids, positions
                ids, positions, is_first = [], [], False
    if is_first and ids:
        yield ids, positions
    elif is_first:
        remedy = "Give another file, or leave the domain out."
        raise InputError([Problem(source, "text", "not a single token", "at least one document with text", remedy)])


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens the model of a config.json reads at most; None where it does not say."""
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    return positions if isinstance(positions, int) else None


def length_problems(
    where: str, length: int | None, config: Mapping[str, Any], source: str = "recipe"
) -> list[Problem]:
    """Return whether windows of `length` tokens, where a length is asked for, are longer than what a model reads.

    Args:
        where: the name of the length, for the error.
        config: the model's config.json.
        source: what the error begins with.
    """
    positions = positions_of(config)
    if length is None or positions is None or length <= positions:
        return []
    return [Problem(source, where, f"{length}", f"at most {positions}, the model's positions")]


def _tokenized(documents: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Encode each document as token ids; several at a time, which is faster."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    for group in grouped(documents):
        for tokens in tokenizer(group, verbose=False)["input_ids"]:
            # A chat template writes the special tokens itself.
            doubled = bos is not None and tokens[:2] == [bos, bos]
            ended = eos is None or tokens[-1:] == [eos]
            yield [*tokens[doubled:], *([] if ended else [eos])]


def grouped(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents for a tokenizer, which is faster with several at a time."""
    group: list[str] = []
    chars = 0
    for document in documents:
        group.append(document)
        chars += len(document)
        if len(group) == 64 or chars >= _CHARS_AT_ONCE:
            yield group
            group, chars = [], 0
    if group:
        yield group
