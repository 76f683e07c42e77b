"""Our rules refuse what transformers' own classes refuse, and nothing that they load."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from btx_merge.architectures.llama import normalise_config
from btx_merge.architectures.loading_rules import config_refusals, generation_refusals

_SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
_SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ({}, False),
        ({"pad_token_id": 39}, False),
        ({"pad_token_id": 40}, True),
        ({"pad_token_id": -1}, False),
        ({"pad_token_id": -41}, True),
        ({"eos_token_id": 40, "bos_token_id": 99}, False),
        (rope("ntk"), True),
        (rope("linear"), True),
        (rope("linear", factor=2.0), False),
        (rope("linear", factor="2"), True),
        (rope("dynamic"), True),
        (rope("dynamic", factor=2.0), False),
        (rope("yarn"), True),
        (rope("yarn", factor=2.0), False),
        (rope("longrope", short_factor=[1.0] * 4), True),
        (rope("longrope", short_factor=[1.0] * 4, long_factor=[1.0] * 4, factor=2.0), False),
        ({"rope_parameters": {**_LLAMA3, "rope_theta": 10000.0}}, False),
        ({"rope_scaling": {key: value for key, value in _LLAMA3.items() if key != "low_freq_factor"}}, True),
        ({"hidden_size": 17, "head_dim": 8}, True),
        ({"head_dim": 7}, True),
        ({"head_dim": 6}, False),
        ({"initializer_range": 1.5}, True),
    ],
)
def test_configs(values: dict[str, Any], refused: bool) -> None:
    values = {**_SIZES, **values}
    assert bool(list(config_refusals("seed", normalise_config(json.loads(json.dumps(values)))))) == refused
    with pytest.raises(Exception) if refused else nullcontext():  # noqa: PT011  (of many kinds)
        LlamaForCausalLM(LlamaConfig(**values))


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ({}, False),
        ({"num_return_sequences": 4, "num_beams": 1, "do_sample": False}, True),
        ({"num_return_sequences": 4, "do_sample": True}, False),
        ({"num_return_sequences": 4, "num_beams": 4}, False),
        ({"num_return_sequences": 5, "num_beams": 4}, True),
        ({"max_new_tokens": 0}, True),
        ({"early_stopping": "always"}, True),
        ({"early_stopping": "never"}, False),
        ({"cache_implementation": "none"}, True),
        ({"cache_implementation": "static"}, False),
        ({"temperature": 0.5, "pad_token_id": -1}, False),
    ],
)
def test_generation_configs(values: dict[str, Any], refused: bool, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    assert bool(list(generation_refusals("seed", "generation_config.json", values))) == refused
    with pytest.raises(ValueError) if refused else nullcontext():  # noqa: PT011  (the wording is transformers')
        GenerationConfig.from_pretrained(tmp_path)


def test_token_ids_that_are_none() -> None:
    (problem,) = generation_refusals("e", "generation_config.json", {"eos_token_id": [[1]]})
    assert problem.where == "generation_config.json: eos_token_id"
    assert not list(generation_refusals("e", "generation_config.json", {"eos_token_id": [1, 2], "bos_token_id": None}))
