"""Branch-Train-MiX (arXiv 2403.07816): a Llama whose feed-forward blocks are experts behind a learned router.

Legend: B batch, T tokens, N = B * T, H hidden, I intermediate, E experts, K experts per token, L layers,
V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils import can_return_tuple

from .configuration_btx import BTXConfig


@use_experts_implementation
class BTXExperts(nn.Module):
    """All experts of a layer in two tensors. The forward pass is the plain one; transformers swaps in faster ones."""

    def __init__(self, config: BTXConfig):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.intermediate_size
        # gate rows, then up rows
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[N, H], with the chosen experts and their weights, [N, K] each, to [N, H]."""
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_out = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out.index_add_(0, token, (expert_out * top_k_weights[token, choice, None]).to(out.dtype))
        return out


class BTXTopKRouting(nn.Module):
    """`g = SoftMax(TopK(W x))`, section 3.2. It has no parameters: a LoRA on the gate changes what comes in here."""

    def __init__(self, config: BTXConfig):
        super().__init__()
        self.config = config

    def forward(self, router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Router logits [N, E] to weights [N, K] in float32, the logits again (recorded here), experts [N, K]."""
        top_logits, top_experts = router_logits.float().topk(self.config.num_experts_per_tok, dim=-1)
        return top_logits.softmax(dim=-1), router_logits, top_experts


class BTXSparseMoeBlock(nn.Module):
    """`FF_MoE(x) = sum_i g_i(W x) FF_i(x)`, equation 1."""

    def __init__(self, config: BTXConfig):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.routing = BTXTopKRouting(config)
        self.experts = BTXExperts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, T, H] to [B, T, H]."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # [N, H]
        weights, _, experts = self.routing(self.gate(tokens))
        return self.experts(tokens, experts, weights).reshape(hidden_states.shape)


class BTXDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with experts for its feed-forward block."""

    def __init__(self, config: BTXConfig, layer_idx: int):
        super(LlamaDecoderLayer, self).__init__()  # not Llama's own: it would build a dense block to throw away
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = BTXSparseMoeBlock(config)  # type: ignore[assignment]
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class BTXPreTrainedModel(LlamaPreTrainedModel):
    config_class = BTXConfig
    config: BTXConfig
    _no_split_modules = ["BTXDecoderLayer"]
    # A bare class is recorded at index 1 of what its forward returns (hidden states at 0).
    _can_record_outputs = {
        "hidden_states": BTXDecoderLayer,
        "attentions": LlamaAttention,
        "router_logits": BTXTopKRouting,
    }
    # Otherwise inherited from whatever Llama was built before in this process: a Llama has no experts to set.
    _can_set_experts_implementation_cached_value = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BTXExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """Every way of switching checkpointing on ends here.

        Raises:
            ValueError: anything but `use_reentrant=False`; torch's default is True. Reentrant checkpointing runs
                the forward pass without gradients, so the recorded router logits would have none, and the
                balancing loss would silently not train the routers.
        """
        function = args[0] if args else kwargs.get("gradient_checkpointing_func")
        if enable and getattr(function, "keywords", {}).get("use_reentrant") is not False:
            raise ValueError(
                "Reentrant gradient checkpointing would lose the routers' gradients: "
                "use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        super()._set_gradient_checkpointing(enable, *args, **kwargs)


class BTXModel(BTXPreTrainedModel, LlamaModel):
    """The decoder without a head. Its forward pass is `LlamaModel`'s."""

    def __init__(self, config: BTXConfig):
        super(LlamaModel, self).__init__(config)  # the layers are of another class than Llama's
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([BTXDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class BTXForCausalLM(BTXPreTrainedModel, GenerationMixin):
    """The language model: `BTXModel` with a head, and the load balancing loss in training."""

    _tied_weights_keys = LlamaForCausalLM._tied_weights_keys
    _tp_plan = LlamaForCausalLM._tp_plan
    _pp_plan = LlamaForCausalLM._pp_plan
    _fsdp_plan = getattr(LlamaForCausalLM, "_fsdp_plan", None)

    def __init__(self, config: BTXConfig):
        super().__init__(config)
        self.model = BTXModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As `LlamaForCausalLM.forward`, with `router_logits` (a tuple of L tensors [N, E]) and `aux_loss`.

        In training with `labels`, `router_aux_loss_coef * aux_loss` is part of `loss`, whether or not
        `output_router_logits` is set. In evaluation `loss` is the language model's alone.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        coef = self.config.router_aux_loss_coef if self.training and labels is not None else 0
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits or coef != 0,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept, :])
        router_logits = outputs.get("router_logits")

        loss, aux_loss = None, None
        if router_logits is not None:
            mask = _token_mask(attention_mask, hidden_states)
            aux_loss = load_balancing_loss(router_logits, self.config.num_experts_per_tok, mask)
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if coef and aux_loss is not None:
                share = _share_of_batch(labels, kwargs.get("num_items_in_batch"))
                loss = loss + coef * share * aux_loss.to(loss.device)

        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=router_logits if output_router_logits else None,
        )


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...], num_experts_per_tok: int, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The paper's balancing loss without its coefficient: `sum over layers of E * sum_i u_i p_i`, section 3.2.

    u_i is the mean over the tokens of the gate weight g_i (0 for experts that were not chosen), p_i the mean of
    SoftMax_i(W x). 1 per layer at balance, up to E at collapse. Not transformers' loss for Mixtral, which pools
    the layers and counts choices instead of weighing them.

    Args:
        router_logits: per layer, [N, E].
        num_experts_per_tok: K.
        token_mask: [N], 0 where a token is padding and does not count; None where all do.
    """
    total = router_logits[0].new_zeros((), dtype=torch.float32)
    for logits in router_logits:
        logits = logits.float()
        top_logits, top_experts = logits.topk(num_experts_per_tok, dim=-1)
        gates = torch.zeros_like(logits).scatter(-1, top_experts, top_logits.softmax(dim=-1))  # [N, E]
        weight = logits.new_ones(len(logits)) if token_mask is None else token_mask.to(logits)
        weight = weight / weight.sum().clamp(min=1)
        layer = logits.shape[-1] * ((weight @ gates) * (weight @ logits.softmax(dim=-1))).sum()
        total = total + layer.to(total.device)
    return total


def _token_mask(attention_mask: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """[N], which of this call's tokens are no padding; from a mask [B, past + T]. Other masks do not tell."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -hidden_states.shape[1] :].reshape(-1)


def _share_of_batch(labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | float:
    """This micro-batch's part of an accumulated batch, so that the parts' losses add up to one mean."""
    if num_items_in_batch is None:
        return 1.0
    return (labels[:, 1:] != -100).sum() / num_items_in_batch


BTXModel.register_for_auto_class("AutoModel")
BTXForCausalLM.register_for_auto_class("AutoModelForCausalLM")
