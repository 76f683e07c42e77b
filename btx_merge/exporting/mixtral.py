"""A merged model as transformers' Mixtral: the names of its tensors, its config, and what a Mixtral cannot be.

Legend: E experts, I width of one, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from btx_merge.architectures.llama import EMBEDDING
from btx_merge.checkpoints.stored import StoredTensor
from btx_merge.errors import Problem
from btx_merge.exporting.files import origin, shared_config
from btx_merge.merging.card import CITATION, UNTRAINED, how_to_use
from btx_merge.merging.plan import ROUTER
from btx_merge.model.merged import MergedModel
from btx_merge.sources.cards import in_card

_BLOCK = "model.layers.{layer}.block_sparse_moe."
MIXTRAL_ROUTER = _BLOCK + "gate.weight"  # of ours: mlp.gate.weight [E, H]
MIXTRAL_GATE = _BLOCK + "experts.{expert}.w1.weight"  # mlp.experts.gate_up_proj[expert, :I]
MIXTRAL_UP = _BLOCK + "experts.{expert}.w3.weight"  # mlp.experts.gate_up_proj[expert, I:]
MIXTRAL_DOWN = _BLOCK + "experts.{expert}.w2.weight"  # mlp.experts.down_proj[expert]
# All other tensors have one name in both.

_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_YARN = {"truncate": True}
_USE_IT = "Only the BTX model itself, in transformers, computes that."


def mixtral_tensors(model: MergedModel) -> dict[str, StoredTensor]:
    """Every tensor of the Mixtral as a range of the model's bytes, layer by layer."""
    shared = model.shared_tensors
    out = {EMBEDDING: shared[EMBEDDING]}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        out |= {name: tensor for name, tensor in shared.items() if name.startswith(prefix)}
        out[MIXTRAL_ROUTER.format(layer=layer)] = model.tensors[ROUTER.format(layer=layer)]
        for expert in range(model.num_experts):
            gate, up = model.gate_up(layer, expert)
            out[MIXTRAL_GATE.format(layer=layer, expert=expert)] = gate
            out[MIXTRAL_UP.format(layer=layer, expert=expert)] = up
            out[MIXTRAL_DOWN.format(layer=layer, expert=expert)] = model.down(layer, expert)
    return out | {name: tensor for name, tensor in shared.items() if name not in out}


def mixtral_config(model: MergedModel) -> dict[str, Any]:
    """config.json of the Mixtral.

    `router_aux_loss_coef` is left to Mixtral's default: its balancing loss is another one than BTX's, for which our
    coefficient would be wrong. It is used where somebody turns `output_router_logits` on to train.
    """
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **shared_config(model),
        "intermediate_size": model.config["intermediate_size"],
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.experts_per_token,
        "output_router_logits": False,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }


def mixtral_refusals(model: MergedModel) -> Iterator[Problem]:
    """All in which the model computes something that a Mixtral does not."""
    config = model.config
    router = config.get("router_type", "top_k")
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
    """Routers that are not trained yet, and programs that compute something else of the result than the model does."""
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


def mixtral_card(model: MergedModel, untrained: Sequence[str] = ()) -> str:
    """The model card's text.

    Args:
        untrained: experts whose router rows nobody has trained yet.
    """
    rows = "\n".join(f"| {number} | {name} |" for number, name in enumerate(model.expert_names))
    of = "" if len(untrained) == model.num_experts else f" of {', '.join(untrained)}"
    warning = f"Its routers{of} are as a merge begins with them. {UNTRAINED}\n\n" if untrained else ""
    return f"""# {in_card(model.located.public_name.rpartition("/")[2])} as a Mixtral

{origin(model, "btx export --format mixtral")}

Its weights are the same bytes under Mixtral's names, and its logits the same bits. {model.experts_per_token} of
{model.num_experts} experts are active per token:

| expert | name |
|---|---|
{rows}

{warning}{how_to_use()}
It needs no code of its own: transformers 4 and 5, vLLM and llama.cpp's converter know a Mixtral.

{CITATION}"""


def _refused(key: str, value: Any, expected: str, remedy: str) -> Problem:
    return Problem("model", f"config.json: {key}", repr(value), expected, remedy)
