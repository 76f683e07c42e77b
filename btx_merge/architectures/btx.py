"""What a merged model consists of: its tensors by name and shape, and the names of its experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from btx_merge.architectures.llama import EMBEDDING, dimensions, expected_tensors, normalise_config, per_layer

ROUTER = "model.layers.{layer}.mlp.gate.weight"
GATE_UP_EXPERTS = "model.layers.{layer}.mlp.experts.gate_up_proj"
DOWN_EXPERTS = "model.layers.{layer}.mlp.experts.down_proj"
MOE_TENSORS = {ROUTER: "E H", GATE_UP_EXPERTS: "E 2I H", DOWN_EXPERTS: "E H I"}
SELECTION_BIAS = "model.layers.{layer}.mlp.routing.e_score_correction_bias"
DEAD = 0.01
"""Part of its ideal share of the choices, 1 / E, below which an expert of a layer counts as dead. It then gets next to
no gradient."""


def expert_names(config: Mapping[str, Any]) -> list[str]:
    """Return the names of a merged model's experts; made of numbers where its config has none."""
    if config.get("expert_names"):
        return list(config["expert_names"])
    chunks = config.get("num_chunks", 1)
    numbers = range(config.get("num_local_experts", 0))
    return [f"{number // chunks}.{number % chunks}" if chunks > 1 else str(number) for number in numbers]


def experts_by_domain(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return a merged model's domains, each with the numbers of its experts.

    A domain is what one source became. Of a model whose sources are whole, each expert is one, whatever its name: a
    dot in it means nothing. Where each source was split into C chunks, its experts are `code.0` to `code.{C-1}`.

    >>> experts_by_domain({"expert_names": ["code.0", "code.1", "math.0", "math.1"], "num_chunks": 2})
    {'code': [0, 1], 'math': [2, 3]}
    """
    is_split = config.get("num_chunks", 1) > 1
    domains: dict[str, list[int]] = {}
    for number, name in enumerate(expert_names(config)):
        domains.setdefault(name.rpartition(".")[0] if is_split else name, []).append(number)
    return domains


def experts_per_token(router_type: str, num_experts_per_tok: int, experts: int) -> int:
    """Return how many experts run for one token in inference."""
    return {"top_k": num_experts_per_tok, "soft": experts}.get(router_type, 1)


def active_parameters(shapes: Mapping[str, Sequence[int]], experts: int, per_token: int) -> int:
    """Return how many weights one token passes through, in a model of tensors with these names and shapes."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    of_experts = sum(size for name, size in sizes.items() if ".experts." in name)  # of all of them together
    return sum(sizes.values()) - of_experts * (experts - per_token) // experts


def merged_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a BTX model of this config.json has; the head where it is untied.

    They stand in the order in which a token meets them.
    """
    dense = normalise_config(config)
    layers, sizes = dense["num_hidden_layers"], dimensions(dense)
    sizes |= {"E": config["num_local_experts"], "2I": 2 * sizes["I"]}
    # a Llama's tensors, with the feed-forward blocks replaced
    out = {name: shape for name, shape in expected_tensors(dense).items() if ".mlp." not in name}
    moe = dict(MOE_TENSORS)
    if config.get("router_selection_bias") and config.get("router_type", "top_k") in ("top_k", "switch"):
        moe[SELECTION_BIAS] = "E"
    for pattern, letters in moe.items():
        out |= dict.fromkeys(per_layer(pattern, layers), tuple(sizes[letter] for letter in letters.split()))

    def place(name: str) -> int:
        if name.startswith("model.layers."):
            return int(name.split(".")[2])
        return -1 if name == EMBEDDING else layers

    return {name: out[name] for name in sorted(out, key=place)}
