"""A tiny BTX model, the slow reference of what it computes, and ways to steer and to read its routers.

Legend: B batch, T tokens, N = B * T, H hidden, E experts, K experts per token, L layers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from btx_merge.modeling import BTXConfig, BTXForCausalLM

EXPERTS = 4
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def tiny_btx(**changes: Any) -> BTXForCausalLM:
    """Weights large enough for every part to matter: logits of about 1, gates that decide, experts that differ."""
    values = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    model = BTXForCausalLM(BTXConfig(**{**values, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("proj.bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def weights_of(model: BTXForCausalLM) -> dict[str, torch.Tensor]:
    return {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


# --- the slow reference: one token, one head, one expert at a time, in float64 ---------------------------------


@dataclass(frozen=True)
class Routed:
    """What decides over the routing of one call, besides the config."""

    training: bool = False
    mask: torch.Tensor | None = None
    """[B, T], 0 where a token is padding."""
    per_token: int | None = None
    active: Sequence[int] | None = None
    temperature: float = 1.0
    noise: Sequence[torch.Tensor] = ()
    """Per layer [N, E]; of the first layer, which is soft, nothing is read."""
    bias: Sequence[torch.Tensor] = ()
    """Per layer [E]."""


def gumbel_noise(config: BTXConfig, count: int, active: Sequence[int] | None = None) -> list[torch.Tensor]:
    """What the layers draw for `count` tokens, per layer [N, E]: as torch's own Gumbel-softmax does, one layer after
    the other but for the first, and for active experts only."""
    noise = [torch.zeros(count, config.num_local_experts) for _ in range(config.num_hidden_layers)]
    experts = sorted(active if active is not None else range(config.num_local_experts))
    for layer in noise[1:]:
        layer[:, experts] = -torch.empty(count, len(experts)).exponential_().log()
    return noise


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Zeros where there is none."""
    zeros = torch.zeros_like
    return {name: zeros(value) if value.grad is None else value.grad for name, value in model.named_parameters()}


def slow_gates(config: BTXConfig, logits: torch.Tensor, layer: int, token: int, routed: Routed) -> list[torch.Tensor]:
    """One token's E gate weights from its router logits [E], before any capacity: 0 for experts not chosen."""
    experts = range(config.num_local_experts)
    active = list(experts) if routed.active is None else list(routed.active)
    kind = "soft" if config.router_type == "sample_top_1" and layer == 0 else config.router_type
    zero = torch.zeros((), dtype=torch.float64)

    def softmax(scores: Sequence[torch.Tensor], over: list[int]) -> list[torch.Tensor]:
        total = sum(torch.exp(scores[e]) for e in over)
        return [torch.exp(scores[e]) / total if e in over else zero for e in experts]

    probabilities = softmax(logits, active)
    if kind == "soft":
        return probabilities
    if kind == "sample_top_1" and routed.training:
        noise = routed.noise[layer][token].double()
        probabilities = softmax([(logits[e] + noise[e]) / routed.temperature for e in experts], active)
    scores = probabilities
    if kind in ("top_k", "switch") and routed.bias:
        scores = [probabilities[e] + routed.bias[layer][e].double() for e in experts]
    per_token = min(routed.per_token or config.num_experts_per_tok, len(active)) if kind == "top_k" else 1
    chosen = sorted(active, key=lambda e: -scores[e].item())[:per_token]

    smooth = probabilities  # what a dense gradient is that of
    if kind == "top_k" and config.router_pre_softmax:
        smooth = [len(active) * config.num_chunks / per_token * probability for probability in probabilities]
    if kind == "top_k" and not config.router_pre_softmax:
        gates = softmax(logits, chosen)
    elif kind == "sample_top_1" and not routed.training:
        gates = [zero + (e in chosen) for e in experts]
    else:
        gates = [smooth[e] if e in chosen else zero for e in experts]
    if config.router_grad == "dense" and routed.training:
        gates = [gate.detach() + dense - dense.detach() for gate, dense in zip(gates, smooth, strict=True)]
    return gates


def slow_experts(
    config: BTXConfig, own: dict[str, torch.Tensor], xs: dict[int, torch.Tensor], layer: int, routed: Routed
) -> dict[int, torch.Tensor]:
    """The layer's output for every real token, by its number among the N."""
    gates = {n: slow_gates(config, own["mlp.gate.weight"] @ x, layer, n, routed) for n, x in xs.items()}
    capacity = math.inf
    if config.router_type == "switch" and routed.training and config.expert_capacity_factor is not None:
        capacity = math.ceil(config.expert_capacity_factor * len(xs) / len(routed.active or gates[min(gates)]))
    taken = [0] * config.num_local_experts
    out = {}
    for n, x in xs.items():
        first = max(range(config.num_local_experts), key=lambda e: gates[n][e].item())
        taken[first] += 1
        if taken[first] > capacity:
            out[n] = torch.zeros_like(x)
            continue
        out[n] = sum(gate * slow_expert(own, e, x) for e, gate in enumerate(gates[n]) if gate.requires_grad or gate)
    return out


def slow_expert(own: dict[str, torch.Tensor], expert: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = own["mlp.experts.gate_up_proj"][expert].chunk(2)
    gated = gate @ x
    return own["mlp.experts.down_proj"][expert] @ (gated * torch.sigmoid(gated) * (up @ x))


def slow_logits(
    config: BTXConfig, weights: dict[str, torch.Tensor], ids: torch.Tensor, routed: Routed | None = None
) -> torch.Tensor:
    """Logits [B, T, V] of Llama with section 3.2's layer in place of its feed-forward block; 0 at padding."""
    routed = routed or Routed()
    batch, length = ids.shape
    mask = torch.ones_like(ids) if routed.mask is None else routed.mask
    rows = [[b * length + t for t in range(length) if mask[b, t]] for b in range(batch)]
    hidden = {n: weights["model.embed_tokens.weight"][ids.flatten()[n]] for row in rows for n in row}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        for row in rows:
            normed = [rms_norm(config, hidden[n], own["input_layernorm.weight"]) for n in row]
            attended = slow_attention(config, own, normed)
            hidden |= {n: hidden[n] + more for n, more in zip(row, attended, strict=True)}
        normed = {n: rms_norm(config, x, own["post_attention_layernorm.weight"]) for n, x in hidden.items()}
        hidden = {n: hidden[n] + more for n, more in slow_experts(config, own, normed, layer, routed).items()}
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    nothing = torch.zeros(config.vocab_size, dtype=torch.float64)
    norm = weights["model.norm.weight"]
    out = [head @ rms_norm(config, hidden[n], norm) if n in hidden else nothing for n in range(batch * length)]
    return torch.stack(out).reshape(batch, length, -1)


def rms_norm(config: BTXConfig, x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    return gamma * x / torch.sqrt((x * x).mean() + config.rms_norm_eps)


def slow_attention(config: BTXConfig, own: dict[str, torch.Tensor], xs: list[torch.Tensor]) -> list[torch.Tensor]:
    size = config.head_dim
    groups = config.num_attention_heads // config.num_key_value_heads

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        return own[f"self_attn.{name}.weight"] @ x + own.get(f"self_attn.{name}.bias", 0)

    def rotate(x: torch.Tensor, position: int) -> torch.Tensor:  # pairs (i, i + size / 2)
        frequency = [10000.0 ** (-2 * i / size) for i in range(size // 2)]
        if config.rope_parameters["rope_type"] == "llama3":
            frequency = [llama3(f) for f in frequency]
        cos = torch.tensor([math.cos(position * f) for f in frequency], dtype=x.dtype)
        sin = torch.tensor([math.sin(position * f) for f in frequency], dtype=x.dtype)
        first, second = x[: size // 2], x[size // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin])

    def llama3(frequency: float) -> float:
        length = 2 * math.pi / frequency
        if length < 16 / 4:
            return frequency
        if length > 16 / 1:
            return frequency / 4
        share = (16 / length - 1) / (4 - 1)
        return (1 - share) * frequency / 4 + share * frequency

    heads_kv, heads = range(config.num_key_value_heads), range(config.num_attention_heads)
    part = [slice(head * size, (head + 1) * size) for head in heads]
    projected = {name: [project(name, x) for x in xs] for name in ("q_proj", "k_proj", "v_proj")}
    queries = [[rotate(q[part[head]], t) for head in heads] for t, q in enumerate(projected["q_proj"])]
    keys = [[rotate(k[part[head]], s) for head in heads_kv] for s, k in enumerate(projected["k_proj"])]
    out = []
    for t in range(len(xs)):
        rows = []
        for head in heads:
            shared = head // groups
            scores = [queries[t][head] @ keys[s][shared] / math.sqrt(size) for s in range(t + 1)]
            values = [projected["v_proj"][s][part[shared]] for s in range(t + 1)]
            weight = torch.softmax(torch.stack(scores), 0)
            rows.append(sum(w * v for w, v in zip(weight, values, strict=True)))
        out.append(project("o_proj", torch.cat(rows)))
    return out


def slow_shares(
    config: BTXConfig, logits: torch.Tensor, layer: int, routed: Routed
) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """u and p of one layer's logits [N, E], token by token and expert by expert, and the tokens that counted."""
    count = len(logits)
    mask = [1] * count if routed.mask is None else routed.mask.flatten().tolist()
    real = [n for n in range(count) if mask[n]]
    experts = range(config.num_local_experts)
    active = experts if routed.active is None else routed.active
    u, p = [[torch.zeros((), dtype=torch.float64) for _ in experts] for _ in range(2)]
    for n in real:
        gates = slow_gates(config, logits[n], layer, n, routed)
        total = sum(logits[n][e].exp() for e in active)
        for e in experts:
            u[e] = u[e] + gates[e] / len(real)
            p[e] = p[e] + (logits[n][e].exp() / total if e in active else 0) / len(real)
    return u, p, len(real)


def slow_balancing_loss(
    config: BTXConfig, layers: Sequence[torch.Tensor], routed: Routed | None = None
) -> torch.Tensor:
    """Sum over layers of E * sum_i u_i p_i (section 3.2), E the number of active experts."""
    routed = routed or Routed()
    total = torch.zeros((), dtype=torch.float64)
    for layer, logits in enumerate(layers):
        u, p, _ = slow_shares(config, logits, layer, routed)
        experts = config.num_local_experts if routed.active is None else len(routed.active)
        total = total + experts * sum(a * b for a, b in zip(u, p, strict=True))
    return total


def slow_z_loss(layers: Sequence[torch.Tensor], routed: Routed | None = None) -> torch.Tensor:
    """Sum over layers of the mean over real tokens of log(sum_i exp(logit_i))**2 (ST-MoE, equation 5)."""
    routed = routed or Routed()
    total = torch.zeros((), dtype=torch.float64)
    for logits in layers:
        mask = [1] * len(logits) if routed.mask is None else routed.mask.flatten().tolist()
        active = range(logits.shape[1]) if routed.active is None else routed.active
        for row, keep in zip(logits, mask, strict=True):
            if keep:
                total = total + sum(row[e].exp() for e in active).log() ** 2 / sum(mask)
    return total


# --- steering routers, and reading them from outside ------------------------------------------------------------


@contextmanager
def given_logits(model: Any, layers: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within, every layer's router says these logits [N, E], whatever its input."""
    decoder = getattr(model, "model", model)
    handles = [
        layer.mlp.gate.register_forward_hook(lambda gate, inputs, out, given=given: given.to(out).reshape(out.shape))
        for layer, given in zip(decoder.layers, layers, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def readable(model: BTXForCausalLM) -> BTXForCausalLM:
    """Every expert computes the same positive number of a token, and writes it to a coordinate of its own."""
    with torch.no_grad():
        for layer in model.model.layers:
            experts = layer.mlp.experts
            gate, _ = experts.gate_up_proj[0].chunk(2)
            experts.gate_up_proj[:] = torch.cat([gate, gate])  # z * sigmoid(z) * z is never negative
            experts.down_proj.zero_()
            for expert in range(len(experts.down_proj)):
                experts.down_proj[expert, expert] = 1.0
    return model


def read_gates(model: BTXForCausalLM, ids: torch.Tensor, **call: Any) -> list[torch.Tensor]:
    """Per layer [N, E], by how much each expert of a `readable` model contributed to each token's output."""
    seen: list[torch.Tensor] = []

    def read(mlp: Any, inputs: tuple[torch.Tensor], out: torch.Tensor) -> None:
        gate, _ = mlp.experts.gate_up_proj[0].double().chunk(2)
        z = inputs[0].flatten(0, 1).double() @ gate.T
        unit = (z * torch.sigmoid(z) * z).sum(1, keepdim=True)
        seen.append(out.flatten(0, 1).double()[:, : mlp.experts.num_experts] / unit)

    handles = [layer.mlp.register_forward_hook(read) for layer in model.model.layers]
    try:
        with torch.no_grad():
            model(ids, **call)
    finally:
        for handle in handles:
            handle.remove()
    return seen
