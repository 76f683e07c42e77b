"""Rules for the values of a Llama's config.json, applied before anything is computed from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from btx_merge.architectures.llama import ACTIVATIONS, DEFAULTS
from btx_merge.errors import InputError, Problem
from btx_merge.values import Rule

_SAVE_AGAIN = "Save it again with save_pretrained, or download it again."
_MANY_CHARACTERS = 80
"""Of a value that an error repeats: about a line of a terminal."""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_activation(value: Any) -> bool:
    return isinstance(value, str) and value in ACTIVATIONS


def _is_rope(value: Any) -> bool:
    """Return whether these are rotary parameters: an object of numbers, lists of numbers, words and switches."""
    if value is None:
        return True
    if not isinstance(value, dict):
        return False
    for item in value.values():
        for part in item if isinstance(item, list) else [item]:
            if not (part is None or isinstance(part, str | bool) or _is_number(part)):
                return False
    return isinstance(value.get("rope_type", value.get("type", "")), str)


def _is_token_ids(value: Any) -> bool:
    ids = value if isinstance(value, list) else [value]
    return all(item is None or (type(item) is int and abs(item) < 2**63) for item in ids)


_SIZE: Rule = ("a whole number above 0", lambda value: type(value) is int and 0 < value < 2**63)
_SWITCH: Rule = ("true or false", lambda value: isinstance(value, bool))
_AT_LEAST_0: Rule = ("a number, at least 0", lambda value: _is_number(value) and value >= 0)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), _SIZE),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"), _SIZE),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache"), _SWITCH),
    **dict.fromkeys(("rms_norm_eps", "initializer_range"), _AT_LEAST_0),
    "rope_theta": ("a number above 0", lambda value: _is_number(value) and value > 0),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), ("an object of numbers and words", _is_rope)),
    "attention_dropout": ("a number in [0, 1)", lambda value: _is_number(value) and 0 <= value < 1),
    "pretraining_tp": _SIZE,
    "hidden_act": ("an activation that transformers knows, such as silu", _is_activation),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), ("a token's id, or a list", _is_token_ids)),
}


def refuse_odd_values(name: str, raw: Mapping[str, Any]) -> None:
    """Refuse values that no Llama can have; what the config leaves out has a default.

    Raises:
        InputError: all of them.
    """
    problems = []
    for key, (expected, is_fine) in _RULES.items():
        if key not in raw or is_fine(raw[key]) or (raw[key] is None and DEFAULTS.get(key, 0) is None):
            continue
        found = json.dumps(raw[key])
        if len(found) > _MANY_CHARACTERS:
            found = found[:_MANY_CHARACTERS] + "..."
        problems.append(Problem(name, f"config.json: {key}", found, expected, _SAVE_AGAIN))
    if problems:
        raise InputError(problems)


def layer_problems(name: str, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Iterator[Problem]:
    """Find a number of layers for which the checkpoint has too few tensors, before the tensors of each are listed."""
    if config["num_hidden_layers"] > max(1, len(tensors)):
        found, expected = f"{config['num_hidden_layers']:,}", f"no more than its {len(tensors)} tensors are enough for"
        remedy = "Weights and config.json must be of one model: save both again with save_pretrained."
        yield Problem(name, "config.json: num_hidden_layers", found, expected, remedy)
