"""The data of a finetuning: windows of all domains by weight, without end, and a held-out part of each.

The order is one for all ranks, and follows from the seed: rank and step say which windows a rank takes. So a run on
several ranks sees what one on a single rank sees, and a resumed one goes on where it was.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch.utils.data import IterableDataset

from btx_merge.errors import InputError, Problem
from btx_merge.texts.references import DomainText, documents
from btx_merge.texts.windows import packed_windows

Window = tuple[list[int], list[int]]
IGNORED = -100
"""The label of a token that is not learned: what torch's cross entropy passes over."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class DomainStream:
    """The windows of one domain.

    Of its documents the second, and then one out of every 1 / holdout, is held out. Where there is only one
    document, of its windows.
    """

    text: DomainText
    tokenizer: Any
    length: int
    holdout: float
    """Part that is held out, in [0, 0.5]."""

    @cached_property
    def has_one_document(self) -> bool:
        return len(list(itertools.islice(documents(self.text, self.tokenizer), 2))) < 2

    def held_out(self, most: int) -> list[Window]:
        """Return at most so many windows of the held-out part."""
        if not self.holdout:
            return []
        return list(itertools.islice(self._windows(True), most))

    def endless(self, shuffled: int, seed: str) -> Iterator[Window]:
        """Repeat the rest without end; each window is drawn from the next `shuffled`."""

        def passes() -> Iterator[Window]:
            while True:
                is_empty = True
                for window in self._windows(False):
                    is_empty = False
                    yield window
                if is_empty:  # otherwise this would go round for ever
                    found = "no window to train on"
                    raise InputError([Problem(self.text.name, "text", found, "", "Give more text.")])

        return _shuffled(passes(), shuffled, random.Random(seed))

    def _windows(self, held_out: bool) -> Iterator[Window]:
        given = documents(self.text, self.tokenizer)
        if not self.holdout:
            yield from packed_windows(given, self.tokenizer, self.length, self.text.name)
        elif self.has_one_document:
            windows = packed_windows(given, self.tokenizer, self.length, self.text.name)
            yield from self._part(windows, held_out)
        else:
            part = self._part(given, held_out)
            yield from packed_windows(part, self.tokenizer, self.length, self.text.name)

    def _part(self, items: Iterable[_T], held_out: bool) -> Iterator[_T]:
        period = round(1 / self.holdout)  # the second of each: a first one alone is then trained on
        return (item for number, item in enumerate(items) if (number % period == 1) == held_out)


class MixedWindows(IterableDataset[dict[str, Any]]):
    """Rows of all domains without end: whose turn it is, is drawn by weight."""

    def __init__(self, streams: Sequence[DomainStream], shuffled: int, seed: int):
        self.streams = streams
        self.shuffled = shuffled
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rng = random.Random(self.seed)
        numbers = range(len(self.streams))
        weights = [stream.text.weight for stream in self.streams]
        windows = [stream.endless(self.shuffled, f"{self.seed} {stream.text.name}") for stream in self.streams]
        while True:
            (domain,) = rng.choices(numbers, weights)
            yield row_of(next(windows[domain]), domain)


def row_of(window: Window, domain: int) -> dict[str, Any]:
    """Make a row of a data set from a window."""
    ids, positions = window
    return {"input_ids": ids, "position_ids": positions, "domain": domain}


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack rows into tensors: input_ids, position_ids and labels [B, T], domain [B].

    The first token of a document is no label: before it stands another document, or nothing. There is no attention
    mask, so that positions tell documents apart. A shorter row is filled up behind, where nothing can look.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name: str) -> torch.Tensor:
        return torch.tensor([[*row[name], *[0] * (longest - len(row[name]))] for row in rows])

    ids, positions = filled("input_ids"), filled("position_ids")
    return {
        "input_ids": ids,
        "position_ids": positions,
        "labels": ids.masked_fill(positions == 0, IGNORED),
        "domain": torch.tensor([row["domain"] for row in rows]),
    }


def _shuffled(items: Iterator[_T], size: int, rng: random.Random) -> Iterator[_T]:
    held = list(itertools.islice(items, size))  # a window waits here until chance picks it
    for item in items:
        place = rng.randrange(len(held))
        held[place], item = item, held[place]
        yield item
