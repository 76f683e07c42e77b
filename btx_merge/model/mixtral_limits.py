"""The limits of the Mixtral format: why a merged model cannot become one, and what it loses as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from btx_merge.errors import Problem
from btx_merge.model.merged import MergedModel

_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_YARN = {"truncate": True}  # the value at which a program that ignores the key computes the same
_USE_IT = "Only the BTX model itself, in transformers, computes that."


def mixtral_refusals(model: MergedModel) -> Iterator[Problem]:
    """Find everything that the model computes and a Mixtral cannot."""
    config = model.config
    router = model.router_type
    if router != "top_k":
        remedy = _USE_IT
        if router == "soft":
            remedy = f"With top_k and num_experts_per_tok {model.num_experts} in config.json it computes the same."
        yield _refused("router_type", router, "'top_k', the only routing of a Mixtral", remedy)
    if router == "top_k" and config.get("router_pre_softmax"):
        expected = "false: a Mixtral's weights add up to 1"
        yield _refused("router_pre_softmax", True, expected, _USE_IT)
    if config.get("router_selection_bias"):
        yield _refused("router_selection_bias", True, "false: a Mixtral chooses by the router alone", _USE_IT)
    if (active := config.get("active_experts")) is not None:
        remedy = "Take the key out, or drop the others for good with btx edit --drop."
        yield _refused("active_experts", active, "all experts: a Mixtral cannot switch any off", remedy)
    if model.dense_config["attention_bias"]:
        yield _refused("attention_bias", True, "false: a Mixtral has no biases", _USE_IT)
    if (act := model.dense_config["hidden_act"]) not in ("silu", "swish"):
        expected = "'silu': vLLM and llama.cpp take that for any Mixtral, whatever its config says"
        yield _refused("hidden_act", act, expected, _USE_IT)
    if (rope := model.dense_config["rope_parameters"]["rope_type"]) not in _ROPE_TYPES:
        expected = f"one of {', '.join(_ROPE_TYPES)}"
        yield Problem("model", "config.json: rope_parameters", f"rope_type {rope!r}", expected, _USE_IT)


def mixtral_warnings(model: MergedModel, untrained: Sequence[str]) -> Iterator[Problem]:
    """Find routers that are not trained yet, and programs that compute the result in another way than the model."""
    if untrained:
        of = "" if len(untrained) == model.num_experts else f"the rows of {', '.join(untrained)} "
        found = f"{of}have not been trained yet: they are random or zeros, as the merge began"
        yield Problem(
            "model", "routers", found, "", "Fit or finetune the model before you judge it: btx fit, btx train."
        )
    rope = model.dense_config["rope_parameters"]
    told = {
        "dynamic": "beyond max_position_embeddings vLLM and llama.cpp do not scale, as transformers does",
        "longrope": "llama.cpp's converter drops its factors; vLLM takes the long ones for short texts too where its "
        "server allows long ones, and no attention_factor",
    }.get(rope["rope_type"])
    odd = [key for key in ("attention_factor", "mscale", "truncate") if rope.get(key) not in (None, _YARN.get(key))]
    if rope["rope_type"] == "yarn" and odd:
        told = f"with {' and '.join(odd)}, which llama.cpp reads otherwise or not at all"
    if told:
        yield Problem("model", "config.json: rope_parameters", f"{rope['rope_type']}: {told}")


def _refused(key: str, value: Any, expected: str, remedy: str) -> Problem:
    return Problem("model", f"config.json: {key}", repr(value), expected, remedy)
