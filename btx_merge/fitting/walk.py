"""One walk through a merged model that fits its shared weights and routers on texts, without training.

Layers are processed in order: read a layer's weights, run all tokens through it, solve for what is fitted there, write
that back, move on. Memory is one layer and the tokens' hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from btx_merge.architectures.llama import EMBEDDING
from btx_merge.fitting.checkpoint import Checkpoint
from btx_merge.fitting.dense_source import DenseSource, row_blocks
from btx_merge.fitting.equations import Statistics
from btx_merge.fitting.passing import ATTENTION, Passage
from btx_merge.fitting.reading import ReadAhead, Tensors, fill_layer
from btx_merge.fitting.recipe import FitTask
from btx_merge.fitting.routers import RouterFit
from btx_merge.fitting.shared import SharedFit
from btx_merge.fitting.states import States, place_of_states
from btx_merge.fitting.streams import TokenStream
from btx_merge.fitting.trial import Trial
from btx_merge.model.held_out import Fitted, LayerFit
from btx_merge.modeling.configuration_btx import BTXConfig
from btx_merge.modeling.modeling_btx import BTXDecoderLayer
from btx_merge.reporting import Reporter


class Walk:
    """Fits a checkpoint in place."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: BTXConfig,
        streams: Sequence[TokenStream],
        statistics: Statistics,
        task: FitTask,
        sources: Mapping[str, DenseSource],
    ):
        """Set up a walk over the streams; nothing is computed yet."""
        # set by hand: only layers are built, not the model that would choose them
        config._attn_implementation = ATTENTION
        config._experts_implementation = "eager"
        self.checkpoint, self.config, self.streams = checkpoint, config, streams
        self.task, self.sources = task, sources if task.combine else {}
        self.passage = Passage(config, checkpoint.device)
        # prompts bear the names of domains, too, but no source follows them
        self.texts = [stream for stream in streams if not stream.is_prompt]
        self.shared, self.routers = None, None
        if task.combine:
            self.shared = SharedFit(checkpoint, self.texts, sources, statistics, task, self.passage)
        if task.router:
            self.routers = RouterFit(checkpoint, config, streams, statistics, task)
        self.passes = not statistics.are_there  # otherwise no token passes: all moments are kept
        self.trial = None
        if task.rows is None:  # the rows of an edit are a part of a router
            self.trial = Trial(checkpoint, self.texts, sources, statistics, task, self.passage)

    @torch.no_grad()
    def run(self, reporter: Reporter) -> Fitted:
        """Fit everything, from the embedding to the head.

        Args:
            reporter: is told how many layers of how many are done.

        Raises:
            NonFiniteError: a solution that the checkpoint's dtype cannot hold.
        """
        if self.shared:
            self.shared.fit_embedding()
        if self.passes:
            self._embed()
        fits: list[LayerFit] = []
        layers = self.config.num_hidden_layers
        with ReadAhead(self._reads()) as weights:
            for index in range(layers):
                reporter.layer_done(index, layers)
                fits += self._fit_layer(index, weights)
        reporter.layer_done(layers, layers)
        if self.shared:
            self.shared.fit_head()
        return Fitted(tuple(fits), self.trial.losses() if self.trial else ())

    def _reads(self) -> Iterator[tuple[str, Callable[[], Tensors]]]:
        """List all layers' weights in the order in which `_fit_layer` takes them."""
        for index in range(self.config.num_hidden_layers):
            yield f"layer {index}", partial(self.checkpoint.read_layer, index)
            for name, source in self.sources.items():
                yield f"attention {index} of {name}", partial(source.read_part, index, "attention")
            if self.passes:
                for name, source in self.sources.items():
                    yield f"feed-forward {index} of {name}", partial(source.read_part, index, "feed_forward")

    def _fit_layer(self, index: int, weights: ReadAhead) -> list[LayerFit]:
        """Fit one layer, and send all states through it."""
        with torch.device("meta"):
            layer = BTXDecoderLayer(self.config, index)
        fill_layer(layer, weights.take(f"layer {index}"), self.checkpoint.device)
        # in this order: the attention's solution changes what the router reads
        if self.shared:
            parts = {name: weights.take(f"attention {index} of {name}") for name in self.sources}
            self.shared.fit_attention(index, layer, parts)
        if self.passes:
            self._attend(index, layer, weights)
        fits = self.routers.fit(index, layer) if self.routers else []
        if self.passes:
            for stream in self.streams:
                self.passage.feed_forward(stream, stream.merged, layer, self.task.through)
            if self.trial:
                self.trial.pass_layer(index, layer)
        return fits

    def _embed(self) -> None:
        """Look up the first hidden states of every stream, in the merged model and in its own source."""
        vocab, hidden = self.checkpoint.tensors[EMBEDDING].shape
        device = self.checkpoint.device
        streams = [(stream, None if stream.is_prompt else self.sources.get(stream.name)) for stream in self.streams]
        if self.trial:
            streams += self.trial.streams()
        values = sum(stream.ids.numel() * (1 + bool(source)) for stream, source in streams) * hidden
        place = place_of_states(device, values)
        for stream, source in streams:
            stream.merged = States((*stream.ids.shape, hidden), device, place)
            if source:
                stream.dense = States((*stream.ids.shape, hidden), device, place)
        for start, stop in row_blocks(vocab):
            rows = self.checkpoint.read(EMBEDDING, start, stop)
            for stream, source in streams:
                # the places [B, T] of the tokens whose rows are in this block
                here = ((stream.ids >= start) & (stream.ids < stop)).to(place)
                tokens = stream.ids.to(place)[here] - start
                stream.merged.kept[here] = rows.to(place)[tokens]
                if source:
                    own = source.rows(EMBEDDING, start, rows)
                    stream.dense.kept[here] = own.to(place)[tokens]

    def _attend(self, index: int, layer: BTXDecoderLayer, weights: ReadAhead) -> None:
        """Send the merged states through attention, and the sources' own through their feed-forward blocks.

        The sources' states went through attention when it was fitted; the router's targets are their states behind
        the feed-forward block.
        """
        for stream in self.streams:
            self.passage.attend(stream, stream.merged, layer)
        by_name = {stream.name: stream for stream in self.texts}
        for name, source in self.sources.items():
            dense = source.layer(index, weights.take(f"feed-forward {index} of {name}"))
            self.passage.feed_forward(by_name[name], by_name[name].dense, dense)
