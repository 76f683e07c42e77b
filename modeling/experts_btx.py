"""The experts of a layer, in two fused tensors.

Legend: N tokens, H hidden, I intermediate, E experts, K experts per token.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

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

    @property
    def is_plain(self) -> bool:
        """Whether the weights are ordinary tensors, which no quantisation has replaced."""
        return type(self.gate_up_proj) is nn.Parameter and self.gate_up_proj.is_floating_point()

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


def refuse_partial_quantization(method: Any, able: tuple[str, ...] = ("torchao", "fp8")) -> None:
    """Raises a ValueError for a method of quantisation that is not able to reach fused experts."""
    name = getattr(method, "value", method)
    if name is not None and name not in able:
        raise ValueError(
            f"Quantisation by {name} would leave the experts as they are, which are most of the model: it "
            "reaches nn.Linear only, and experts are fused tensors. Load the model in bfloat16, or use torchao with "
            "a FqnToConfig that names them: r're:.*mlp\\.experts\\.(gate_up|down)_proj'."
        )
