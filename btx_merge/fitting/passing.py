"""Hidden states on their way through a model's layers, a batch of windows at a time. Nothing is fitted here.

Legend: B windows, T tokens in each, N = B * T, H hidden, Q inputs of the output projection, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from btx_merge.fitting.streams import TokenStream
from btx_merge.modeling.configuration_btx import BTXConfig
from btx_merge.modeling.modeling_btx import BTXDecoderLayer

Block = Callable[[torch.Tensor], torch.Tensor]
"""A feed-forward block: from what stands behind its norm, [B, T, H], to what it adds."""


class Attended(NamedTuple):
    """What attention does with a batch of hidden states."""

    added: torch.Tensor
    """What is added to the states, [B, T, H]."""
    heads: torch.Tensor
    """The input of the output projection, [N, Q]."""


class Passage:
    """Sends hidden states through layers: those of the merged model, or of a dense source of the same shape."""

    def __init__(self, config: BTXConfig, device: torch.device):
        self.config, self.device = config, device
        self.rotary = LlamaRotaryEmbedding(config).to(device)

    def norm(self, weight: torch.Tensor) -> LlamaRMSNorm:
        """Return a norm with this weight, [H]."""
        norm = LlamaRMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        norm.weight.data = weight
        return norm

    def attend(self, stream: TokenStream, states: torch.Tensor, layer: Any) -> None:
        """Send all states [B, T, H] of a stream through a layer's attention, in place."""
        for batch in stream.batches(stream.all):
            hidden = states[batch].to(self.device)
            states[batch] = (hidden + self.attention(layer, stream, hidden, batch).added).to(states.device)

    def feed_forward(self, stream: TokenStream, states: torch.Tensor, layer: Any, block: Block) -> None:
        """Send all states [B, T, H] of a stream through a layer's norm and a feed-forward block, in place."""
        for batch in stream.batches(stream.all):
            hidden = states[batch].to(self.device)
            states[batch] = (hidden + block(layer.post_attention_layernorm(hidden))).to(states.device)

    def attention(self, layer: Any, stream: TokenStream, hidden: torch.Tensor, batch: slice) -> Attended:
        """Compute a layer's attention for one batch of states. No document sees another.

        Args:
            hidden: [B, T, H].
            batch: which of the stream's windows they are.
        """
        positions = stream.positions[batch].to(self.device)
        # [B, T]; causal attention within a document: [B, T, T]
        document = (positions == 0).cumsum(dim=-1)  # 1, 1, 1, 2, 2, ...: positions begin again at 0 in each document
        order = torch.arange(positions.shape[1], device=self.device)
        mask = (document[:, :, None] == document[:, None]) & (order[:, None] >= order)
        # the heads' outputs exist inside attention alone; a hook catches them on their way into the output projection
        heads: list[torch.Tensor] = []
        keep: Any = lambda module, inputs: heads.append(inputs[0].flatten(0, 1))  # noqa: E731
        hook = layer.self_attn.o_proj.register_forward_pre_hook(keep)
        added, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden),
            position_embeddings=self.rotary(hidden, positions),
            attention_mask=mask[:, None],
        )
        hook.remove()
        return Attended(added, heads[0])


def own_experts(layer: BTXDecoderLayer, stream: TokenStream, read: torch.Tensor) -> torch.Tensor:
    """Compute what a domain's own expert adds to [..., H]; its chunks together are its source's block."""
    rows = read.flatten(0, -2)  # [N, H]
    chosen = torch.tensor(stream.experts, device=rows.device).expand(len(rows), -1)
    weights = torch.ones_like(chosen, dtype=rows.dtype)
    return torch.as_tensor(layer.mlp.experts(rows, chosen, weights)).reshape(read.shape)


def every_expert(layer: BTXDecoderLayer, read: torch.Tensor, experts: int) -> torch.Tensor:
    """Compute what each expert gives for inputs [N, H]: [E, N, H]."""
    one = torch.ones(len(read), 1, device=read.device)
    chosen = (torch.full_like(one, expert, dtype=torch.long) for expert in range(experts))
    return torch.stack([layer.mlp.experts(read, expert, one) for expert in chosen])
