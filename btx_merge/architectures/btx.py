"""What a merged model consists of: its tensors by name and shape, and the names of its experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from btx_merge.architectures.llama import expected_tensors, normalise_config, per_layer

ROUTER = "model.layers.{layer}.mlp.gate.weight"
GATE_UP_EXPERTS = "model.layers.{layer}.mlp.experts.gate_up_proj"
DOWN_EXPERTS = "model.layers.{layer}.mlp.experts.down_proj"
_MOE_TENSORS = {ROUTER: "E H", GATE_UP_EXPERTS: "E 2I H", DOWN_EXPERTS: "E H I"}
SELECTION_BIAS = "model.layers.{layer}.mlp.routing.e_score_correction_bias"


def expert_names(config: Mapping[str, Any]) -> list[str]:
    """Return the names of a merged model's experts, or their numbers where its config has no names."""
    return list(config.get("expert_names") or map(str, range(config.get("num_local_experts", 0))))


def own_experts(domain: str, names: Sequence[str]) -> list[int]:
    """Return the numbers of a domain's experts: the one of its name, or the chunks that it was split into."""
    whole = [number for number, name in enumerate(names) if name == domain]
    return whole or [number for number, name in enumerate(names) if name.rpartition(".")[0] == domain]


def experts_per_token(router_type: str, num_experts_per_tok: int, experts: int) -> int:
    """Return how many experts run for one token in inference."""
    return {"top_k": num_experts_per_tok, "soft": experts}.get(router_type, 1)


def active_parameters(shapes: Mapping[str, Sequence[int]], experts: int, per_token: int) -> int:
    """Return how many weights one token passes through, in a model of tensors with these names and shapes."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    of_experts = sum(size for name, size in sizes.items() if ".experts." in name)
    return sum(sizes.values()) - of_experts * (experts - per_token) // experts


def merged_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a BTX model of this config.json has; the head where it is untied."""
    dense = normalise_config(config)
    experts, width, hidden = config["num_local_experts"], config["intermediate_size"], config["hidden_size"]
    out = {name: shape for name, shape in expected_tensors(dense).items() if ".mlp." not in name}
    moe = {
        ROUTER: (experts, hidden),
        GATE_UP_EXPERTS: (experts, 2 * width, hidden),
        DOWN_EXPERTS: (experts, hidden, width),
    }
    if config.get("router_selection_bias") and config.get("router_type", "top_k") in ("top_k", "switch"):
        moe[SELECTION_BIAS] = (experts,)
    for pattern, shape in moe.items():
        out |= dict.fromkeys(per_layer(pattern, dense["num_hidden_layers"]), shape)
    return out
