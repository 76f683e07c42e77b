"""The passes over the texts: as the model routes, with each expert switched off, and with each alone.

All passes over some windows come one after the other, so that a token's losses can be compared and forgotten.

Legend: S scored tokens of a batch, N of a window, X experts with their chunks as one, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from btx_merge.errors import NonFiniteError
from btx_merge.inspecting.figures import DomainFigures
from btx_merge.inspecting.page_text import PageText
from btx_merge.inspecting.routes import Routes
from btx_merge.inspecting.tally import Tally, WindowLosses
from btx_merge.inspecting.words import words_of
from btx_merge.measuring.losses import Batch, batch_losses, batches
from btx_merge.measuring.windows import Window

_BEFORE, _AFTER = 24, 6
"""Tokens around one of the worst that are shown with it."""


@dataclass(frozen=True)
class Switches:
    """Which experts run in the passes beside the model's own, by their numbers."""

    without: tuple[tuple[int, ...], ...]
    """[X] of them: all but one."""
    alone: tuple[tuple[int, ...], ...]
    """[X] of them: one."""

    @classmethod
    def of(cls, experts: Mapping[str, Sequence[int]]) -> Switches:
        """Return those for a model of these experts."""
        every = sorted(number for numbers in experts.values() for number in numbers)
        without = [tuple(number for number in every if number not in numbers) for numbers in experts.values()]
        return cls(tuple(without), tuple(map(tuple, experts.values())))

    @property
    def passes(self) -> int:
        """How many passes they take beside the model's own: of two experts, without one is the other alone."""
        return len({numbers for numbers in (*self.without, *self.alone) if numbers})


@dataclass(frozen=True)
class Inspection:
    """A loaded model and how its texts are passed through it."""

    model: Any
    tokenizer: Any
    routes: Routes
    switches: Switches
    """None of them where experts are not to be switched off."""
    batch_tokens: int
    text_done: Callable[[int], None]
    """Called after each pass over some text with its bytes."""

    def domain(self, name: str, windows: Iterable[Window], page: PageText) -> DomainFigures:
        """Measure the windows of one domain, and give the page what it shows of them.

        Raises:
            NonFiniteError: a loss is not finite.
        """
        tally = Tally(name, list(self.routes.experts), self.routes.num_layers)
        for batch in batches(self._expected(windows, page), self.batch_tokens):
            for window, gates, losses in self._measured(batch, tally):
                if not losses.routed.isfinite().all():
                    raise NonFiniteError(f"{name}: the model's loss is not finite. Nothing was written.")
                page.fill(window, gates.numpy(), losses.routed.numpy(), losses.alone.T.numpy())
                tally.add_losses(losses, _Context(window, self.tokenizer))
        return tally.figures()

    def _expected(self, windows: Iterable[Window], page: PageText) -> Iterator[Window]:
        for window in windows:
            page.expect(window, self.tokenizer)
            yield window

    def _measured(self, batch: Batch, tally: Tally) -> Iterator[tuple[Window, torch.Tensor, WindowLosses]]:
        """Run all passes over a batch; yield each window with its gates [N, L, X] and its losses."""
        with self.routes.watching(batch.is_scored.flatten()) as layers:
            routed = batch_losses(self.model, batch)
        self._tell(batch)
        is_text = torch.ones(len(batch.targets), dtype=torch.bool)
        sizes = [window.scored for window in batch.windows]
        for window, part in zip(batch.windows, torch.split(is_text, sizes), strict=True):
            part[:1] = window.offset > 0  # otherwise the prefix
        tally.add_routes(layers, is_text)
        gates = torch.split(torch.stack([layer.gates for layer in layers], dim=1), sizes)
        known: dict[tuple[int, ...], list[torch.Tensor]] = {}
        without = self._switched(batch, self.switches.without, known)
        alone = self._switched(batch, self.switches.alone, known)
        for place, window in enumerate(batch.windows):
            yield window, gates[place], WindowLosses(routed[place], without[place], alone[place])

    def _tell(self, batch: Batch) -> None:
        self.text_done(sum(window.nbytes for window in batch.windows))

    def _switched(
        self, batch: Batch, choices: Sequence[tuple[int, ...]], known: dict[tuple[int, ...], list[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """Return for each window the losses with only these experts, [X, N]; NaN where none is left.

        Args:
            known: what was computed for the batch already; gets the rest.
        """
        rows: list[list[torch.Tensor]] = [[] for _ in batch.windows]
        for numbers in choices:
            if numbers and numbers not in known:
                known[numbers] = batch_losses(self.model, batch, active_experts=list(numbers))
                self._tell(batch)
            for place, window in enumerate(batch.windows):
                losses = known[numbers][place] if numbers else torch.full((window.scored,), torch.nan)
                rows[place].append(losses)
        empty = [torch.zeros(0, window.scored) for window in batch.windows]
        return [torch.stack(row) if row else none for row, none in zip(rows, empty, strict=True)]


class _Context:
    """The words around a token of a window; decoded when they are wanted."""

    def __init__(self, window: Window, tokenizer: Any):
        self._window, self._tokenizer = window, tokenizer
        self._words: list[str] | None = None

    def __call__(self, place: int) -> tuple[str, str, str]:
        """Return the text before a scored token, the token's, and the text after it."""
        window = self._window
        if self._words is None:
            self._words = words_of(window.ids, self._tokenizer)
        here = len(window.ids) - window.scored + place
        first = 1 if window.offset == 0 else 0  # the prefix is no text
        before = self._words[max(first, here - _BEFORE) : here]
        return "".join(before), self._words[here], "".join(self._words[here + 1 : here + 1 + _AFTER])
