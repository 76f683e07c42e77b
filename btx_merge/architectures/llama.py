"""The tensors of a Llama checkpoint by name and shape, and the config that shapes them.

Legend: V vocabulary, H hidden, I intermediate, Q query heads times head_dim, P key/value heads times head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

SHARED_TENSORS = {  # combined over the sources; the names stay
    EMBEDDING: "V H",
    "model.layers.{layer}.input_layernorm.weight": "H",
    "model.layers.{layer}.self_attn.q_proj.weight": "Q H",
    "model.layers.{layer}.self_attn.k_proj.weight": "P H",
    "model.layers.{layer}.self_attn.v_proj.weight": "P H",
    "model.layers.{layer}.self_attn.o_proj.weight": "H Q",
    "model.layers.{layer}.post_attention_layernorm.weight": "H",
    "model.norm.weight": "H",
}
ATTENTION_BIASES = {
    "model.layers.{layer}.self_attn.q_proj.bias": "Q",
    "model.layers.{layer}.self_attn.k_proj.bias": "P",
    "model.layers.{layer}.self_attn.v_proj.bias": "P",
    "model.layers.{layer}.self_attn.o_proj.bias": "H",
}
GATE = "model.layers.{layer}.mlp.gate_proj.weight"
UP = "model.layers.{layer}.mlp.up_proj.weight"
DOWN = "model.layers.{layer}.mlp.down_proj.weight"
EXPERT_TENSORS = {GATE: "I H", UP: "I H", DOWN: "H I"}  # become experts
FF_NORM = "model.layers.{layer}.post_attention_layernorm.weight"

BUFFERS = tuple(f"rotary_emb.{name}" for name in ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached"))
"""Endings of tensors that old versions saved and that are computed today: passed over."""

DEFAULTS: dict[str, Any] = {  # LlamaConfig's, for keys that a config.json leaves out
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
}
MUST_AGREE = (  # between all sources; the vocabulary and the tying have checks of their own
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "attention_bias",
    "mlp_bias",
    "rope_parameters",
)
ACTIVATIONS = frozenset(  # transformers' `ACT2FN`, which is not imported here because it needs torch
    (
        *("gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "gelu_accurate", "laplace"),
        *("gelu_python_tanh", "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu", "relu2", "relu6"),
        *("sigmoid", "silu", "swish", "sqrtsoftplus", "tanh", "xielu", "hardswish"),
    )
)
_ROPE_FROM_LENGTH = ("llama3", "yarn", "longrope")  # original_max_position_embeddings defaults to the maximum


def normalise_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with every default filled in and the rotary parameters in transformers 5's form.

    Older files have `rope_theta` and `rope_scaling`, in several spellings. The result is what `LlamaConfig`
    makes of the file (which a test checks) without importing it.
    """
    out = {key: config.get(key, default) for key, default in DEFAULTS.items()}
    if out["num_key_value_heads"] is None:
        out["num_key_value_heads"] = out["num_attention_heads"]
    if out["head_dim"] is None and out["num_attention_heads"]:
        out["head_dim"] = out["hidden_size"] // out["num_attention_heads"]
    # transformers 4 wrote rope_theta and rope_scaling (with `type` before 4.43), transformers 5 writes rope_parameters
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if rope["rope_type"] in _ROPE_FROM_LENGTH:
        rope.setdefault("original_max_position_embeddings", out["max_position_embeddings"])
    out["rope_parameters"] = rope
    return out


def dimensions(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the size for each letter of the legend, by a normalised config."""
    head_dim = config["head_dim"]
    return {
        "V": config["vocab_size"],
        "H": config["hidden_size"],
        "I": config["intermediate_size"],
        "Q": config["num_attention_heads"] * head_dim,
        "P": config["num_key_value_heads"] * head_dim,
    }


def expected_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a Llama with this normalised config; the head where it is untied."""
    dims = dimensions(config)
    table = {**SHARED_TENSORS, **(ATTENTION_BIASES if config["attention_bias"] else {}), **EXPERT_TENSORS}
    if not config["tie_word_embeddings"]:
        table[HEAD] = "V H"
    shapes: dict[str, tuple[int, ...]] = {}
    for pattern, letters in table.items():
        shape = tuple(dims[letter] for letter in letters.split())
        shapes |= dict.fromkeys(per_layer(pattern, config["num_hidden_layers"]), shape)
    return shapes


def is_computed(name: str) -> bool:
    """Return whether a tensor is one that old versions saved and that is computed today."""
    return name.endswith(BUFFERS)


def per_layer(pattern: str, layers: int) -> Iterator[str]:
    """Expand a pattern of names: one name for each layer if it holds `{layer}`, otherwise the pattern itself.

    >>> list(per_layer("model.layers.{layer}.mlp", 2))
    ['model.layers.0.mlp', 'model.layers.1.mlp']
    """
    if "{layer}" not in pattern:
        yield pattern
        return
    for layer in range(layers):
        yield pattern.format(layer=layer)
