"""The experts of a layer, in two fused tensors.

Legend: N tokens, H hidden, I intermediate, E experts, K experts per token.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .configuration_btx import BTXConfig


@use_experts_implementation
class _FusedExperts(nn.Module):
    """The forward pass is the plain one; transformers swaps in faster ones (`experts_implementation`)."""

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
        """Run the chosen experts [N, K] on tokens [N, H] and add up their outputs by their weights [N, K]: [N, H]."""
        out = torch.zeros_like(hidden_states)
        for expert, weights in enumerate(zip(_each(self.gate_up_proj), _each(self.down_proj), strict=True)):
            token, choice = torch.where(top_k_index == expert)
            expert_out = self._run(hidden_states[token], *weights)
            out.index_add_(0, token, (expert_out * top_k_weights[token, choice, None]).to(out.dtype))
        return out

    def _run(self, rows: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, down)


class BTXExperts(_FusedExperts):
    """All experts of a layer in two tensors, gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""

    config: BTXConfig

    @property
    def is_plain(self) -> bool:
        """Whether the weights are ordinary tensors, which no quantisation has replaced."""
        return type(self.gate_up_proj) is nn.Parameter and self.gate_up_proj.is_floating_point()

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the implementation that was chosen; but one token on a CPU needs no sorting by experts."""
        kind, dtype = hidden_states.device.type, self.gate_up_proj.dtype
        is_mixed = torch.is_autocast_enabled(kind) and hidden_states.dtype != dtype == torch.get_autocast_dtype(kind)
        if is_mixed:  # frozen experts lie in autocast's dtype, which it does not bring to grouped_mm in every version
            return self.forward(hidden_states.to(dtype), top_k_index, top_k_weights).to(hidden_states.dtype)
        sorts = self.config._experts_implementation == "grouped_mm" and not torch.compiler.is_compiling()
        if not (sorts and hidden_states.device.type == "cpu" and hidden_states.shape[0] == 1):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        gate_up, down = self.gate_up_proj, self.down_proj  # once: under a LoRA each access adds it up
        out = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
        for expert, weight in zip(top_k_index[0].tolist(), top_k_weights.unbind(1), strict=True):
            if expert < self.num_experts:  # otherwise another rank's
                out = out + weight * self._run(hidden_states, gate_up[expert], down[expert])
        return out.to(hidden_states.dtype)


def _each(weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the weights of each expert.

    Indexing would add up a gradient as large as all of them for each; quantised weights have no gradient.
    """
    return weight.unbind() if weight.requires_grad else [weight[expert] for expert in range(len(weight))]


def refuse_partial_quantization(method: Any, able: tuple[str, ...] = ("torchao", "fp8")) -> None:
    """Refuse a method of quantisation that cannot reach fused experts.

    Raises:
        ValueError: the method would pass over the experts.
    """
    name = getattr(method, "value", method)
    if name is not None and name not in able:
        raise ValueError(
            f"Quantisation by {name} would leave the experts as they are, which are most of the model: it "
            "reaches nn.Linear only, and experts are fused tensors. Load the model in bfloat16, or use torchao with "
            "a FqnToConfig that names them: r're:.*mlp\\.experts\\.(gate_up|down)_proj'."
        )
