"""Branch-Train-MiX (arXiv 2403.07816): a Llama whose feed-forward blocks are experts behind a learned router.

Legend: B batch, T tokens, N = B * T, H hidden, I intermediate, E experts, K experts per token, L layers,
V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
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
from .experts_btx import BTXExperts, refuse_partial_quantization
from .routing_btx import (
    BTXRouting,
    GlobalBatch,
    RouterCall,
    RouterRecords,
    load_balancing_loss,
    real_tokens,
    router_z_loss,
    routings_of,
)


class BTXSparseMoeBlock(nn.Module):
    """`FF_MoE(x) = sum_i g_i(W x) FF_i(x)`, equation 1."""

    def __init__(self, config: BTXConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.routing = BTXRouting(config, layer_idx)
        self.experts = BTXExperts(config)

    def forward(self, hidden_states: torch.Tensor, router_call: RouterCall | None = None) -> torch.Tensor:
        """Send tokens through their experts: [B, T, H] to [B, T, H]."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # [N, H]
        call = router_call or RouterCall(self.config.num_experts_per_tok)
        weights, _, experts = self.routing(self.gate(tokens), call)
        return self.experts(tokens, experts, weights).reshape(hidden_states.shape)


class BTXDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with experts for its feed-forward block."""

    def __init__(self, config: BTXConfig, layer_idx: int):
        super(LlamaDecoderLayer, self).__init__()  # not Llama's own: it would build a dense block to throw away
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = BTXSparseMoeBlock(config, layer_idx)  # type: ignore[assignment]
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        router_call: RouterCall | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention
        block = self.mlp(self.post_attention_layernorm(hidden_states), router_call)
        return hidden_states + block


class BTXPreTrainedModel(LlamaPreTrainedModel):
    config_class = BTXConfig
    config: BTXConfig
    model_tags = ["btx", "branch-train-mix", "mixture-of-experts", "merge"]  # of the card that `push_to_hub` makes
    _no_split_modules = ["BTXDecoderLayer"]
    # A bare class is recorded at index 1 of what its forward returns (hidden states at 0).
    _can_record_outputs = {
        "hidden_states": BTXDecoderLayer,
        "attentions": LlamaAttention,
        "router_logits": BTXRouting,
    }
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give a class that FSDP2 derives from a model's, in torch's module, the name of the model's own class.

        `save_pretrained` names the class in `auto_map` and copies the file that defines it, so this one goes by the
        name of ours.
        """
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("torch."):
            ours = next(base for base in cls.__mro__ if not base.__module__.startswith("torch."))
            cls.__module__, cls.__qualname__, cls.__name__ = ours.__module__, ours.__qualname__, ours.__name__

    def __init__(self, config: BTXConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self._global_batch = GlobalBatch()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Answer for transformers, which would look for a decorator here or take a Llama's answer for ours."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BTXExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, BTXRouting):
            for name, buffer in module.named_buffers(recurse=False):
                (init.ones_ if name == "temperature" else init.zeros_)(buffer)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, and refuse quantisation that passes over its experts.

        Raises:
            ValueError: quantisation that would pass over the experts, which are most of the model. transformers
                quantises `nn.Linear`; the experts are fused tensors.
        """
        requested = kwargs.get("quantization_config")
        method = requested.get("quant_method") if isinstance(requested, dict) else requested
        refuse_partial_quantization(getattr(method, "quant_method", method))
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if getattr(model, "is_quantized", False):
            plain = any(isinstance(module, BTXExperts) and module.is_plain for module in model.modules())
            if plain:  # whatever the method is called, it has passed over the experts
                refuse_partial_quantization(model.quantization_method, ())
            if "experts_implementation" not in kwargs:
                model.set_experts_implementation("eager")  # the others need operations that such tensors lack
        return loaded

    def set_active_experts(self, experts: Sequence[str | int] | None, save: bool = False) -> None:
        """Switch experts off: from now on tokens are only sent to these, and the weights of the rest renormalise.

        Args:
            experts: names of `config.expert_names` or numbers; None for all.
            save: whether `save_pretrained` keeps the choice, in `config.active_experts`.

        Raises:
            ValueError: an expert that there is not, or none.
        """
        numbers = self.config.expert_numbers(experts)
        decoder: Any = self.base_model
        decoder.active_experts = numbers
        if save:
            self.config.active_experts = experts if experts is None else list(experts)

    def set_router_temperature(self, temperature: float) -> None:
        """Set the temperature of the Gumbel-softmax in training, above 0. A state of the run: it is not saved.

        Raises:
            ValueError: the routing is not `sample_top_1`, or the temperature is not above 0.
        """
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature!r}; expected a number above 0.")
        if self.config.router_type != "sample_top_1":
            raise ValueError(f"router_type is {self.config.router_type!r}; only sample_top_1 has a temperature.")
        for routing in routings_of(self):
            if routing.router_type == "sample_top_1":
                routing.temperature.fill_(temperature)

    @torch.no_grad()
    def update_router_bias(self, speed: float = 1e-3) -> None:
        """Balance the experts without a loss (arXiv 2408.15664, algorithm 1); call it after each optimizer step.

        Experts that got less than the mean of the tokens since the last call, on all ranks, are ranked higher by
        `speed`, the others lower.

        Raises:
            ValueError: the config does not have `router_selection_bias`.
        """
        if not self.config.router_selection_bias:
            raise ValueError("router_selection_bias is False; load the model with router_selection_bias=True.")
        decoder: Any = self.base_model
        routings = routings_of(self)
        load, decoder.tokens_per_expert = decoder.tokens_per_expert, None
        if load is None:  # nothing was trained on here, but perhaps on other ranks
            load = torch.zeros(len(routings), self.config.num_local_experts, device=self.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load)
        active = decoder.active_experts or self.config.expert_numbers(self.config.active_experts)
        load = load[:, active]  # experts that are switched off are neither behind nor ahead
        for routing, step in zip(routings, (load.mean(dim=-1, keepdim=True) - load).sign(), strict=True):
            bias = routing.e_score_correction_bias
            bias[active] += speed * step.to(bias.device)

    @property
    def _trains_routers(self) -> bool:
        return self.training and bool(self.config.router_aux_loss_coef or self.config.router_z_loss_coef)

    def _router_losses(
        self,
        records: RouterRecords,
        targets: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the balancing loss as it is, and what joins the loss in training.

        The second has its coefficients, and is scaled by this micro-batch's part of an accumulated batch, so that the
        parts' losses add up to one mean.

        Args:
            records: of the forward pass, with statistics.
            targets: the labels that are predicted, -100 where none.
            num_items_in_batch: how many those are in all micro-batches together.
        """
        # layers may lie on several devices
        stacked = torch.stack([layer.to(records.statistics[0].device) for layer in records.statistics])
        labelled = None if targets is None or num_items_in_batch is None else (targets != -100).sum()
        global_means, share = None, stacked.new_ones(())
        if self.config.router_aux_loss_scope == "global_batch" and self.training:
            tokens = torch.as_tensor(records.tokens).to(stacked)
            global_means, share = self._global_batch.join(stacked, tokens, labelled, num_items_in_batch)
        elif labelled is not None and num_items_in_batch is not None:
            share = (labelled / num_items_in_batch).to(stacked)
        aux_loss = load_balancing_loss(stacked, global_means)
        added = self.config.router_aux_loss_coef * aux_loss + self.config.router_z_loss_coef * router_z_loss(stacked)
        return aux_loss, share * added

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """Switch checkpointing on or off; every way of doing so ends here.

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
    """The decoder without a head. Its forward pass is `LlamaModel`'s, with more said to the routers."""

    def __init__(self, config: BTXConfig):
        super(LlamaModel, self).__init__(config)  # the layers are of another class than Llama's
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([BTXDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.active_experts: list[int] | None = None  # by number; the config's where not set
        self.tokens_per_expert: torch.Tensor | None = None  # [L, E], since the selection bias was last updated
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        num_experts_per_tok: int | None = None,
        active_experts: Sequence[str | int] | None = None,
        router_records: RouterRecords | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Run the decoder as `LlamaModel.forward`, with `router_logits` on request.

        Args:
            num_experts_per_tok: K for this call; the config's where not given.
            active_experts: names or numbers of the experts that this call may use; those of `set_active_experts`
                where not given.
            router_records: what the layers leave for the losses.
        """
        if self.training and self.config.router_selection_bias and router_records is None:
            router_records = RouterRecords(with_statistics=False)
        inputs = inputs_embeds if input_ids is None else input_ids
        if inputs is not None:  # otherwise LlamaModel says what is wrong
            call = self._router_call(inputs, num_experts_per_tok, active_experts)
            if self.training or router_records is not None:  # otherwise nobody counts tokens
                real = real_tokens(attention_mask, inputs.shape[1])
                call = call._replace(real_tokens=real, records=router_records)
                if router_records is not None:
                    router_records.tokens = inputs.shape[0] * inputs.shape[1] if real is None else real.sum()
            kwargs["router_call"] = call
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        if router_records is not None:
            router_records.is_open = False  # checkpointed layers run once more in the backward pass
            if self.training and router_records.tokens_per_expert:
                counts = torch.stack([layer.to(self.device) for layer in router_records.tokens_per_expert])
                before = self.tokens_per_expert
                self.tokens_per_expert = counts if before is None else before + counts
        return MoeModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.get("router_logits"),
        )

    def _router_call(
        self,
        inputs: torch.Tensor,
        num_experts_per_tok: int | None,
        active_experts: Sequence[str | int] | None,
    ) -> RouterCall:
        if num_experts_per_tok is None:
            num_experts_per_tok = self.config.num_experts_per_tok
        else:
            self.config.check("num_experts_per_tok", num_experts_per_tok)
        experts = self.config.active_experts if self.active_experts is None else self.active_experts
        experts = self.config.expert_numbers(experts if active_experts is None else active_experts)
        active = None
        if len(experts) < self.config.num_local_experts:
            active = torch.tensor(experts, device=inputs.device)
        return RouterCall(num_experts_per_tok, active)


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
        num_experts_per_tok: int | None = None,
        active_experts: Sequence[str | int] | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Run the model as `LlamaForCausalLM.forward`; `router_logits` is a tuple of L tensors [N, E], `aux_loss` a
        scalar.

        In training with `labels`, `router_aux_loss_coef * aux_loss` is part of `loss`, whether or not
        `output_router_logits` is set. In evaluation `loss` is the language model's alone.

        Args:
            num_experts_per_tok, active_experts: for this call, see `BTXModel.forward`. `generate` takes them too.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        in_loss = labels is not None and self._trains_routers
        records = RouterRecords(with_statistics=True) if in_loss or output_router_logits else None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            num_experts_per_tok=num_experts_per_tok,
            active_experts=active_experts,
            router_records=records,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept, :])

        loss, aux_loss = None, None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if records is not None:
            targets = kwargs.get("shift_labels")
            if targets is None and labels is not None:
                targets = labels[:, 1:]
            aux_loss, added = self._router_losses(records, targets, kwargs.get("num_items_in_batch"))
            if loss is not None and self.training:
                loss = loss + added.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


class _WithRouterLosses(BTXPreTrainedModel):
    """A classification head of transformers, whose loss in training is joined by the routers'."""

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
        **kwargs: Any,
    ) -> Any:
        records = RouterRecords(with_statistics=True) if labels is not None and self._trains_routers else None
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            router_records=records,
            return_dict=True,
            **kwargs,
        )
        if records is not None:
            outputs.loss = outputs.loss + self._router_losses(records)[1]
        return outputs


class BTXForSequenceClassification(_WithRouterLosses, GenericForSequenceClassification, BTXPreTrainedModel):
    """`BTXModel` with a linear head on the last token that is no padding: [B, num_labels]."""

    def __init__(self, config: BTXConfig):
        BTXPreTrainedModel.__init__(self, config)  # not the head's own: it would look the base model up by AutoModel
        self.num_labels: int = config.num_labels or 2
        self.model = BTXModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class BTXForTokenClassification(_WithRouterLosses, GenericForTokenClassification, BTXPreTrainedModel):
    """`BTXModel` with a linear head on each token: [B, T, num_labels]."""

    def __init__(self, config: BTXConfig):
        BTXPreTrainedModel.__init__(self, config)
        self.num_labels: int = config.num_labels or 2
        self.model = BTXModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


BTXModel.register_for_auto_class("AutoModel")
BTXForCausalLM.register_for_auto_class("AutoModelForCausalLM")
BTXForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
BTXForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
