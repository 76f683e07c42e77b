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
        ({"pad_token_id": [1]}, True),
        ({"compile_config": {}}, True),
        ({"compile_config": None}, False),
        ({"watermarking_config": {}}, False),
        ({"watermarking_config": {"bias": 2.5, "seeding_scheme": "selfhash", "greenlist_ratio": 1}}, False),
        ({"watermarking_config": {"seeding_scheme": "other"}}, True),
        ({"watermarking_config": {"greenlist_ratio": 1.5}}, True),
        ({"watermarking_config": {"context_width": 0}}, True),
        ({"watermarking_config": {"keys": [1]}}, True),
        ({"watermarking_config": True}, True),
        ({"suppress_tokens": 1}, True),
        ({"suppress_tokens": [[1]]}, True),
        ({"suppress_tokens": [1, 2], "forced_eos_token_id": [2, 3]}, False),
        ({"suppress_tokens": [], "forced_eos_token_id": []}, False),
        ({"logits_processor": None}, True),
        ({"streamer": 1}, True),
        ({"to_dict": 1}, True),
        ({"__class__": "x"}, True),
        ({"a_key_of_somebody": {"a": 1}}, False),
    ],
)
def test_generation_configs(values: dict[str, Any], refused: bool, tmp_path: Path) -> None:
    assert bool(list(generation_refusals("seed", "generation_config.json", values))) == refused
    with pytest.raises(Exception) if refused else nullcontext():  # noqa: PT011  (of many kinds)
        loaded(values, tmp_path)


def loaded(values: dict[str, Any], folder: Path) -> GenerationConfig:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return GenerationConfig.from_pretrained(folder)


_ODD = ("x", "1", "", -1, 0, 1, 0.5, 1.5, True, [], [1], ["a"], [[1]], {}, {"a": 1}, 1e400)
_NEWER = [({"assistant_ensemble_weight": 1.5}), ({"suppress_tokens": [1, 2], "forced_bos_token_id": 2})]
"""What only the newer releases of transformers look at."""


@pytest.mark.parametrize("key", [*vars(GenerationConfig()), "method", "a_key_of_somebody"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_nothing_that_transformers_refuses_is_missed(key: str, tmp_path: Path) -> None:
    for value in _ODD:
        try:
            loaded({key: value}, tmp_path)
        except Exception:  # of many kinds
            assert list(generation_refusals("seed", "generation_config.json", {key: value})), value


@pytest.mark.parametrize("values", _NEWER)
def test_what_newer_releases_refuse(values: dict[str, Any]) -> None:
    (problem,) = generation_refusals("seed", "generation_config.json", values)
    assert problem.where.endswith(list(values)[-1])


def test_token_ids_that_are_none() -> None:
    (problem,) = generation_refusals("e", "generation_config.json", {"eos_token_id": [[1]]})
    assert problem.where == "generation_config.json: eos_token_id"
    assert not list(generation_refusals("e", "generation_config.json", {"eos_token_id": [1, 2], "bos_token_id": None}))
