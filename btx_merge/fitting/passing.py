"""Hidden states on their way through a model's layers, a batch of windows at a time. Nothing is fitted here.

Legend: B windows, T tokens in each, N = B * T, H hidden, Q inputs of the output projection, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, repeat_kv

from btx_merge.fitting.states import States
from btx_merge.fitting.streams import TokenStream
from btx_merge.modeling.configuration_btx import BTXConfig
from btx_merge.modeling.modeling_btx import BTXDecoderLayer

ATTENTION = "btx_documents"
"""transformers' name of the attention below: `_attn_implementation` of a config whose layers are sent through here."""


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

    def attend(self, stream: TokenStream, states: States, layer: Any) -> None:
        """Send all states of a stream through a layer's attention, in place."""
        for batch in stream.batches(stream.all):
            hidden = states[batch]
            states[batch] = hidden + self.attention(layer, stream, hidden, batch).added

    def feed_forward(self, stream: TokenStream, states: States, layer: Any, through: str = "router") -> None:
        """Send all states of a stream through a layer's norm and feed-forward block, in place.

        Args:
            through: router, for the block as it is, which in a source's layer is dense; expert, for the domain's own
                expert alone.
        """
        for batch in stream.batches(stream.all):
            hidden = states[batch]
            read = layer.post_attention_layernorm(hidden)
            added = own_experts(layer, stream, read) if through == "expert" else layer.mlp(read)
            states[batch] = hidden + added

    def attention(self, layer: Any, stream: TokenStream, hidden: torch.Tensor, batch: slice) -> Attended:
        """Compute a layer's attention for one batch of states. No document sees another.

        Args:
            hidden: [B, T, H].
            batch: which of the stream's windows they are.
        """
        # the heads' outputs exist inside attention alone; a hook catches them on their way into the output projection
        heads: list[torch.Tensor] = []
        keep: Any = lambda module, inputs: heads.append(inputs[0].flatten(0, 1))  # noqa: E731
        hook = layer.self_attn.o_proj.register_forward_pre_hook(keep)
        added, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden),
            position_embeddings=self.rotary(hidden, stream.positions[batch].to(self.device)),
            attention_mask=None,
            documents=stream.documents[batch],
        )
        hook.remove()
        return Attended(added, heads[0])


def attention_by_document(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    **call: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention within each document, as transformers wants it from an attention function.

    Masks [B, T, T] would cost the same for windows of many short documents as for those of a long one.

    Args:
        query: [B, heads, T, d], and key and value with perhaps fewer heads.
        call: `documents`, of each window where its documents begin and end, and `scaling` of the scores.

    Returns:
        [B, T, heads, d], and nothing for the weights.
    """
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    for window, runs in enumerate(call["documents"]):
        for start, stop in runs:
            q, k, v = (states[window, None, :, start:stop] for states in (query, key, value))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=call["scaling"])
            out[window, start:stop] = attended[0].transpose(0, 1)
    return out, None


AttentionInterface.register(ATTENTION, attention_by_document)


def expert_output(layer: BTXDecoderLayer, expert: int, read: torch.Tensor) -> torch.Tensor:
    """Compute what one expert gives for [..., H]."""
    experts = layer.mlp.experts
    gate, up = F.linear(read, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return F.linear(experts.act_fn(gate) * up, experts.down_proj[expert])


def own_experts(layer: BTXDecoderLayer, stream: TokenStream, read: torch.Tensor) -> torch.Tensor:
    """Compute what a domain's own expert adds to [..., H]; its chunks together are its source's block."""
    first, *others = (expert_output(layer, expert, read) for expert in stream.experts)
    return sum(others, start=first)
