"""The tokens that a fit sends through a model: every domain's text in windows, or its prompts.

Legend: B windows, T tokens in each, H hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from btx_merge.architectures.btx import experts_by_domain
from btx_merge.errors import InputError, Problem
from btx_merge.fitting.states import States
from btx_merge.texts.references import DomainText, documents
from btx_merge.texts.windows import packed_windows

_WINDOW = 512
"""Tokens of a window, at most; a choice, not a measured optimum."""
_TOKENS_AT_ONCE, _TOKENS_AT_ONCE_ON_GPU = 2048, 8192
"""Of one stream, computed together. On a CPU their activations should stay in its cache: with 8,192 the experts took
1.36 times as long where H is 192, and 1.12 times where it is 512. On a GPU they bound the memory: 0.13 GB for each
array [N, H] in float32 where H is 4,096."""
_HELD_OUT = 0.1
"""Part of each domain's windows, its last, on which the temperature is chosen. One number is chosen on it, so a tenth
is plenty; the rest makes the equations."""


@dataclass(eq=False)
class TokenStream:
    """The tokens of one domain on their way through the model."""

    name: str
    """The domain's."""
    experts: list[int]
    """The numbers of its own experts: one, or its chunks."""
    ids: torch.Tensor
    """[B, T]"""
    positions: torch.Tensor
    """[B, T]; from 0 in each document."""
    share: float = 1.0
    """Its weight among the domains."""
    scored_bytes: int = 0
    """Bytes in UTF-8 of the held-out windows' text, without each document's first token, which nothing foretells."""
    is_prompt: bool = False
    """Whether it is a domain's prompts, of which nothing is held out."""
    merged: States = field(init=False)
    """Hidden states in the merged model, [B, T, H]."""
    dense: States = field(init=False)
    """Hidden states in its own source, where shared weights are fitted."""

    @cached_property
    def documents(self) -> list[list[tuple[int, int]]]:
        """Of each window, where its documents begin and end. Positions begin again at 0 in each document."""
        length, found = self.ids.shape[1], []
        for window in self.positions:
            starts = {0, *torch.nonzero(window == 0).flatten().tolist()}  # the first may go on from another window
            found.append([*itertools.pairwise([*sorted(starts), length])])
        return found

    @property
    def all(self) -> slice:
        """All windows."""
        return slice(0, len(self.ids))

    @property
    def holds_out(self) -> bool:
        """Whether there is a window that the equations do not see."""
        return len(self.ids) > 1

    @property
    def fitted(self) -> slice:
        """The windows that the equations are made of."""
        return slice(0, max(1, len(self.ids) - self._held))

    @property
    def held_out(self) -> slice:
        """The windows that they are tried on; where there is only one, the same."""
        return slice(len(self.ids) - self._held if self.holds_out else 0, len(self.ids))

    def held_out_alone(self) -> TokenStream:
        """Return a stream of the held-out windows and nothing else, with states of its own."""
        return replace(self, ids=self.ids[self.held_out], positions=self.positions[self.held_out])

    @property
    def _held(self) -> int:
        return max(1, round(_HELD_OUT * len(self.ids)))

    @property
    def per_token(self) -> float:
        """A token's weight in equations over all domains."""
        return self.share / self.ids[self.fitted].numel()

    def batches(self, part: slice) -> Iterator[slice]:
        """Group windows that are computed together."""
        tokens = _TOKENS_AT_ONCE if self.merged.device.type == "cpu" else _TOKENS_AT_ONCE_ON_GPU
        size = max(1, tokens // self.ids.shape[1])
        return (slice(start, min(start + size, part.stop)) for start in range(part.start, part.stop, size))


def streams_of(
    folder: Path,
    config: Any,
    texts: Mapping[str, DomainText],
    prompts: Mapping[str, Sequence[str]],
    domain_tokens: int,
) -> list[TokenStream]:
    """Pack the tokens of every domain into windows.

    Raises:
        InputError: a text that cannot be read, or a tokenizer with more tokens than the model.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    experts = experts_by_domain(config.to_dict())
    length = min(_WINDOW, config.max_position_embeddings)
    streams = []
    for name, text in texts.items():
        windows = packed_windows(documents(text, tokenizer), tokenizer, length, name)
        found = list(itertools.islice(windows, max(1, domain_tokens // length)))
        ids, positions = (torch.tensor(part) for part in zip(*found, strict=True))
        streams.append(TokenStream(name, experts[name], ids, positions, text.weight))
        streams[-1].scored_bytes = _scored_bytes(streams[-1], tokenizer)
    for name, lines in prompts.items():
        tokens = [tokenizer(line)["input_ids"][: config.max_position_embeddings] for line in lines]
        ids = torch.tensor([[token for line in tokens for token in line]])
        positions = torch.tensor([[position for line in tokens for position in range(len(line))]])
        streams.append(TokenStream(name, experts[name], ids, positions, is_prompt=True))
    largest = max(int(stream.ids.max()) for stream in streams)
    if largest >= config.vocab_size:
        found_id = f"the tokenizer gives the id {largest}"
        raise InputError([Problem("model", "tokenizer", found_id, f"below {config.vocab_size}, the embedding's rows")])
    return streams


def _scored_bytes(stream: TokenStream, tokenizer: Any) -> int:
    """Count the bytes of a stream's held-out text but for each document's first token."""
    total = 0
    for ids, positions in zip(stream.ids[stream.held_out], stream.positions[stream.held_out], strict=True):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
        for begin, end in itertools.pairwise(starts):
            text, first = (tokenizer.decode(ids[begin:stop], skip_special_tokens=True) for stop in (end, begin + 1))
            total += len(text.encode("utf-8", "replace")) - len(first.encode("utf-8", "replace"))
    return total
