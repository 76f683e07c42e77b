"""What a fit has lost, and where: held-out windows on three ways through the layers.

By their own source, by the merged model with every token at its own domain's expert, and by the merged model's own
routers. From the first to the second is what shared weights lose; from there to the third is what routers lose. One of
the last two is how the walk sends its tokens anyway, and the sources' states are its own where it fits to them; only
what is missing is computed here.

Legend: B windows, T tokens in each, N scored tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from btx_merge.architectures.llama import EMBEDDING, HEAD
from btx_merge.fitting.checkpoint import Checkpoint
from btx_merge.fitting.dense_source import DenseSource, row_blocks
from btx_merge.fitting.equations import Moments, Statistics
from btx_merge.fitting.passing import Passage
from btx_merge.fitting.recipe import FitTask
from btx_merge.fitting.streams import TokenStream
from btx_merge.model.held_out import DomainLoss
from btx_merge.modeling.modeling_btx import BTXDecoderLayer

_TOKENS_AT_ONCE = 512
"""Whose logits of one block of the vocabulary are in memory at a time."""

_WAYS = ("own_expert", "routed", "source")


class Trial:
    """Sends held-out windows the ways that the walk does not."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        texts: Sequence[TokenStream],
        sources: Mapping[str, DenseSource],
        statistics: Statistics,
        task: FitTask,
        passage: Passage,
    ):
        """Prepare; nothing is computed yet.

        Args:
            texts: the domains' token streams, those of the walk.
        """
        self.checkpoint, self.sources, self.statistics = checkpoint, sources, statistics
        self.task, self.passage = task, passage
        self.walked = texts
        self.windows = [stream.held_out_alone() for stream in self.walked]
        """The held-out windows of each of them, whose states go the other way."""
        self.other_way = "expert" if task.through == "router" else "router"
        self.moves_sources = not task.combine

    def streams(self) -> list[tuple[TokenStream, DenseSource | None]]:
        """Return the windows, each with the source whose states it holds besides, if any."""
        return [(stream, self.sources.get(stream.name) if self.moves_sources else None) for stream in self.windows]

    def pass_layer(self, index: int, layer: BTXDecoderLayer) -> None:
        """Send the windows through a layer as it was just fitted."""
        for stream, source in self.streams():
            self.passage.attend(stream, stream.merged, layer)
            self.passage.feed_forward(stream, stream.merged, layer, self.other_way)
            if source:
                weights = source.read_part(index, "attention") | source.read_part(index, "feed_forward")
                dense = source.layer(index, weights)
                self.passage.attend(stream, stream.dense, dense)
                self.passage.feed_forward(stream, stream.dense, dense)

    def losses(self) -> tuple[DomainLoss, ...]:
        """Compute what comes out behind the last layer, with the head as it was fitted.

        Where kept statistics took the place of the pass, what was computed then is returned, if it was with the same
        penalties; otherwise nothing.
        """
        if not self.walked:
            return ()
        penalties = torch.tensor([self.task.router_ridge, self.task.regmean_ridge], dtype=torch.float64)
        kept = self.statistics.get("losses", lambda: {"penalties": penalties, **self._bits_by_domain()})
        if not torch.equal(kept.pop("penalties"), penalties):
            return ()
        found = []
        for name, bits in kept.items():
            own_expert, routed, source = bits.tolist()
            found.append(DomainLoss(name, own_expert, routed, None if math.isnan(source) else source))
        return tuple(found)

    def _bits_by_domain(self) -> Moments:
        """Return by domain bits per byte by `_WAYS`, [3]; NaN where there is no source."""
        norm = self.passage.norm(self.checkpoint.read("model.norm.weight"))
        found = {}
        for walked, windows in zip(self.walked, self.windows, strict=True):
            merged = {self.task.through: walked.merged[walked.held_out], self.other_way: windows.merged[windows.all]}
            ways = {"own_expert": norm(merged["expert"]), "routed": norm(merged["router"])}
            if windows.name in self.sources:
                dense = windows.dense[windows.all] if self.moves_sources else walked.dense[walked.held_out]
                source = self.sources[windows.name]
                own_norm = self.passage.norm(source.tensor("model.norm.weight"))
                ways["source"] = own_norm(dense)
            bits = [self._bits(windows, ways[way], way) if way in ways else math.nan for way in _WAYS]
            found[windows.name] = torch.tensor(bits, dtype=torch.float64)
        return found

    def _bits(self, stream: TokenStream, states: torch.Tensor, way: str) -> float:
        """Return bits per byte of a stream's windows.

        Args:
            states: behind the last norm, [B, T, H].
            way: whether the source's head reads them or the merged one.
        """
        # the next token is scored, except the first of a document
        scored = stream.positions[:, 1:] != 0
        rows = states[:, :-1][scored.to(states.device)]  # [N, H]
        targets = stream.ids[:, 1:][scored].to(states.device)
        name = HEAD if HEAD in self.checkpoint.tensors else EMBEDDING
        # over blocks of the vocabulary: a whole head may be larger than all that a fit holds
        logs = torch.full((len(rows),), -math.inf, device=rows.device)
        hits = torch.zeros_like(logs)
        for start, stop in row_blocks(self.checkpoint.tensors[name].shape[0]):
            head = self.checkpoint.read(name, start, stop)
            if way == "source":
                head = self.sources[stream.name].rows(name, start, head)
            for first in range(0, len(rows), _TOKENS_AT_ONCE):
                part = slice(first, first + _TOKENS_AT_ONCE)
                logits = rows[part] @ head.T
                logs[part] = torch.logaddexp(logs[part], logits.logsumexp(dim=-1))
                column = (targets[part] - start).clamp(0, stop - start - 1)
                is_here = (targets[part] >= start) & (targets[part] < stop)
                hits[part] += logits.gather(1, column[:, None])[:, 0] * is_here
        return (logs - hits).double().sum().item() / math.log(2) / max(1, stream.scored_bytes)
