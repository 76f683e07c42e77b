"""Windows of text in which every token is scored once: the protocol of lm-evaluation-harness' rolling loss.

Its `loglikelihood_rolling` (lm_eval/utils.py, `get_rolling_token_windows`) is repeated token by token, so that figures
are equal. A document is read without special tokens. Its first token follows the prefix token: bos, or eos where there
is no bos. A document that is longer than a window is cut into windows of `length` scored tokens, each after the one
token before it; the last window has fewer to score, and as many tokens before them as fill it up.

Any tokenizer of transformers will do; nothing of it is imported.

Legend: C tokens of context, T scored tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from btx_merge.errors import InputError, Problem
from btx_merge.reporting import Reporter
from btx_merge.texts.references import DomainText, documents
from btx_merge.texts.windows import grouped

DEFAULT_WINDOW = 1024
"""Tokens of a window where nobody says, as in a finetuning; the model's own length if that is less."""


@dataclass(frozen=True)
class Window:
    """Some tokens of one document that are scored together."""

    ids: tuple[int, ...]
    """[C + T]: the context, then the tokens that are scored."""
    scored: int
    """T, at least 1."""
    document: int
    """The document's number in its domain, from 0."""
    offset: int
    """The first scored token's number in its document."""
    nbytes: int
    """Bytes in UTF-8 of the text that the scored tokens stand for. A document's windows add up to the document."""

    @property
    def place(self) -> tuple[int, int]:
        """What no other window of a domain has."""
        return self.document, self.offset


@dataclass(frozen=True)
class Amount:
    """How much of a domain is measured."""

    documents: int
    windows: int
    tokens: int
    """Scored tokens."""
    nbytes: int
    """Bytes in UTF-8 of their text."""
    last_bytes: int
    """Those of the last document, which `--tokens` may have cut."""
    largest_id: int
    """Of its tokens; below the rows of the embedding of a model that can read it."""
    digest: str
    """Of all windows: where it is the same, two models read the same tokens."""


def windows_of(
    documents: Iterable[str], tokenizer: Any, length: int, tokens: int | None = None, source: str = "data"
) -> Iterator[Window]:
    """Cut documents into windows of at most `length` scored tokens.

    Example: a document of the tokens 5 6 7 8 9, windows of 3, the prefix token 1. The first window has the ids
    1 5 6 7 and scores 5 6 7. The second has the ids 6 7 8 9 and scores 8 9; 6 and 7 are its context, for the model
    reads 3 tokens at a time.

    Args:
        tokens: the domain ends before the window with which more tokens than these would be scored; the first is
            always there. None: all of it.
        source: the domain's name, for the error.

    Raises:
        InputError: the documents have no token at all, the tokenizer has neither bos nor eos, or it does not tell
            which characters a token stands for and `tokens` are given.
    """
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        found, expected = "neither a bos nor an eos token", "one of them, for a text's first token to follow"
        raise InputError([Problem(source, "tokenizer", found, expected, "Name one in its tokenizer_config.json.")])
    if tokens is not None and not tokenizer.is_fast:
        found, remedy = "a slow one, which does not tell a token's characters", "Measure all of the text."
        raise InputError([Problem(source, "tokenizer", found, "a fast one, to measure a part of a text", remedy)])
    scored = number = 0
    for group in grouped(documents):
        encoded = tokenizer(group, add_special_tokens=False, verbose=False)
        for place, text in enumerate(group):
            for window in _windows_of_document(text, encoded, place, length, prefix, number):
                if scored and tokens is not None and scored + window.scored > tokens:
                    return
                yield window
                scored += window.scored
            number += 1
    if not scored:
        remedy = "Give another file, or leave the domain out."
        raise InputError([Problem(source, "text", "not a single token", "at least one document with text", remedy)])


def _windows_of_document(
    text: str, encoded: Any, place: int, length: int, prefix: int, number: int
) -> Iterator[Window]:
    ids: Sequence[int] = encoded["input_ids"][place]
    begin = characters = 0
    while begin < len(ids):
        end = min(begin + length, len(ids))
        # the last window is filled up with context from the left, so that `length` tokens are read
        context = [prefix] if begin == 0 else ids[end - length - 1 : begin]
        is_last = end == len(ids)
        until = len(text) if is_last else max(characters, _characters(encoded, place, end - 1))
        nbytes = len(text[characters:until].encode("utf-8"))
        yield Window((*context, *ids[begin:end]), end - begin, number, begin, nbytes)
        begin, characters = end, until


def _characters(encoded: Any, place: int, token: int) -> int:
    """Return where a token of a text ends; 0 where nobody knows. One that ends within a character counts all of it."""
    span = encoded.token_to_chars(place, token) if encoded.is_fast else None
    return 0 if span is None else int(span.end)


def amount_of(windows: Iterable[Window]) -> Amount:
    """Count what windows hold."""
    digest = hashlib.blake2b(digest_size=16)
    documents = count = tokens = nbytes = last = largest = 0
    for window in windows:
        count += 1
        tokens += window.scored
        nbytes += window.nbytes
        last = window.nbytes + (last if window.offset else 0)
        documents = window.document + 1
        largest = max(largest, *window.ids)
        digest.update(np.array([window.scored, *window.ids], np.int64).tobytes())
    return Amount(documents, count, tokens, nbytes, last, largest, digest.hexdigest())


def cut(documents: Iterable[str], amount: Amount) -> Iterator[str]:
    """Give out the documents that were measured, for a model that reads other tokens: the last one may be cut."""
    for number, document in enumerate(documents, 1):
        if number == amount.documents:
            yield document.encode("utf-8")[: amount.last_bytes].decode("utf-8")
            return
        yield document


@dataclass(frozen=True, eq=False)
class Domain:
    """A domain's text, and how much of it is measured."""

    text: DomainText
    tokenizer: Any
    """The first model's. Its template writes messages for all of them."""
    window: int
    """Tokens of a window, at most."""
    tokens: int | None
    """Tokens that are scored, at most; None for all."""
    amount: Amount
    """In the first model's tokens."""

    @classmethod
    def counted(cls, text: DomainText, tokenizer: Any, window: int, tokens: int | None) -> Domain:
        """Count what there is to measure.

        Raises:
            InputError: a text that cannot be read, or that has no token.
        """
        windows = windows_of(documents(text, tokenizer), tokenizer, window, tokens, text.name)
        return cls(text, tokenizer, window, tokens, amount_of(windows))

    def documents(self) -> Iterator[str]:
        """Give out the text that is measured, the last document cut where it ends."""
        return cut(documents(self.text, self.tokenizer), self.amount)

    def reads_alike(self, tokenizer: Any) -> bool:
        """Return whether a tokenizer makes the first model's tokens of the text."""
        return amount_of(self.windows(tokenizer, True)).digest == self.amount.digest

    def windows(self, tokenizer: Any, same_tokens: bool) -> Iterator[Window]:
        """Cut the text that is measured, all of it, into windows of any model's tokens."""
        if same_tokens:
            found = documents(self.text, self.tokenizer)
            return windows_of(found, tokenizer, self.window, self.tokens, self.text.name)
        return windows_of(self.documents(), tokenizer, self.window, source=self.text.name)


class Progress:
    """Adds up the bytes that are done, over all models, and tells how far that is."""

    def __init__(self, reporter: Reporter, nbytes: int):
        self._reporter, self._all, self._done = reporter, nbytes, 0
        reporter.text_done(0, nbytes)

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        self._reporter.text_done(self._done, self._all)
