"""One walk through a merged model that fits its shared weights and routers on texts, in closed form.

Layers are processed in order: read a layer's weights, run all tokens through it, solve for what is fitted there, write
that back, move on. Memory is one layer and the tokens' hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from btx_merge.architectures.llama import EMBEDDING
from btx_merge.fitting.checkpoint import Checkpoint
from btx_merge.fitting.dense_source import DenseSource, row_blocks
from btx_merge.fitting.equations import Statistics
from btx_merge.fitting.passing import Block, Passage, own_experts
from btx_merge.fitting.recipe import FitTask
from btx_merge.fitting.routers import RouterFit
from btx_merge.fitting.shared import SharedFit
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
        config._attn_implementation = "sdpa"
        config._experts_implementation = "eager"
        self.checkpoint, self.config, self.streams = checkpoint, config, streams
        self.task, self.sources = task, sources if task.combine else {}
        self.passage = Passage(config, checkpoint.device)
        self.shared, self.routers = None, None
        if task.combine:
            texts = [stream for stream in streams if not stream.is_prompt]
            self.shared = SharedFit(checkpoint, texts, sources, statistics, task, self.passage)
        if task.router:
            self.routers = RouterFit(checkpoint, config, streams, statistics, task)
        self.passes = not statistics.are_there  # otherwise no token passes: all moments are kept
        self.trial = None
        if task.rows is None:  # the rows of an edit are a part of a router
            self.trial = Trial(checkpoint, streams, sources, statistics, task, self.passage)

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
        for index in range(layers):
            reporter.layer_done(index, layers)
            layer = self._layer(index)
            # in this order: the attention's solution changes what the router reads
            if self.shared:
                self.shared.fit_attention(index, layer)
            if self.passes:
                self._attend(index, layer)
            if self.routers:
                fits += self.routers.fit(index, layer)
            if self.passes:
                for stream in self.streams:
                    self.passage.feed_forward(stream, stream.merged, layer, self._block(layer, stream))
            if self.passes and self.trial:
                self.trial.pass_layer(index, layer)
        reporter.layer_done(layers, layers)
        if self.shared:
            self.shared.fit_head()
        return Fitted(tuple(fits), self.trial.losses() if self.trial else ())

    def _layer(self, index: int) -> BTXDecoderLayer:
        """Read one layer of the checkpoint. Built on the meta device, it takes no memory before it has its weights."""
        with torch.device("meta"):
            layer = BTXDecoderLayer(self.config, index)
        layer.load_state_dict(self.checkpoint.layer(index), assign=True)
        return layer.eval()

    def _embed(self) -> None:
        """Look up the first hidden states of every stream, in the merged model and in its own source."""
        vocab, hidden = self.checkpoint.tensors[EMBEDDING].shape
        streams = [(stream, self.sources.get(stream.name)) for stream in self.streams]
        if self.trial:
            streams += self.trial.streams()
        for stream, source in streams:
            stream.merged = torch.empty(*stream.ids.shape, hidden)
            if source:
                stream.dense = torch.empty_like(stream.merged)
        for start, stop in row_blocks(vocab):
            rows = self.checkpoint.read(EMBEDDING, start, stop).cpu()
            for stream, source in streams:
                # the places [B, T] of the tokens whose rows are in this block
                here = (stream.ids >= start) & (stream.ids < stop)
                stream.merged[here] = rows[stream.ids[here] - start]
                if source:
                    own = source.rows(EMBEDDING, start, rows.to(self.checkpoint.device)).cpu()
                    stream.dense[here] = own[stream.ids[here] - start]

    def _attend(self, index: int, layer: BTXDecoderLayer) -> None:
        """Send the merged states through attention, and the sources' own through their feed-forward blocks.

        The sources' states went through attention when it was fitted; the router's targets are their states behind
        the feed-forward block.
        """
        for stream in self.streams:
            self.passage.attend(stream, stream.merged, layer)
        for stream in self.streams:
            if stream.name in self.sources:
                dense = self.sources[stream.name].layer(index, "feed_forward")
                self.passage.feed_forward(stream, stream.dense, dense, dense.mlp)

    def _block(self, layer: BTXDecoderLayer, stream: TokenStream) -> Block:
        """Return what leads to the next layer: the domain's own expert, or what the router chooses."""
        if self.task.through == "router":
            return lambda read: torch.as_tensor(layer.mlp(read))
        return lambda read: own_experts(layer, stream, read)
