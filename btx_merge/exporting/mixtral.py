"""A merged model as transformers' Mixtral: the names of its tensors, its config and its card.

Legend: E experts, I width of one, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from btx_merge.architectures.btx import ROUTER
from btx_merge.architectures.llama import EMBEDDING
from btx_merge.checkpoints.stored import StoredTensor
from btx_merge.exporting.files import origin, shared_config
from btx_merge.model.card import CITATION, UNTRAINED, how_to_use, markdown_table
from btx_merge.model.merged import MergedModel
from btx_merge.reporting import counted
from btx_merge.sources.cards import in_card

_BLOCK = "model.layers.{layer}.block_sparse_moe."
MIXTRAL_ROUTER = _BLOCK + "gate.weight"  # of ours: mlp.gate.weight [E, H]
MIXTRAL_GATE = _BLOCK + "experts.{expert}.w1.weight"  # mlp.experts.gate_up_proj[expert, :I]
MIXTRAL_UP = _BLOCK + "experts.{expert}.w3.weight"  # mlp.experts.gate_up_proj[expert, I:]
MIXTRAL_DOWN = _BLOCK + "experts.{expert}.w2.weight"  # mlp.experts.down_proj[expert]


def mixtral_tensors(model: MergedModel) -> dict[str, StoredTensor]:
    """Map every tensor of the Mixtral to a range of the model's bytes, layer by layer."""
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
    """Return the config.json of the Mixtral.

    `router_aux_loss_coef` is left to Mixtral's default: its balancing loss is another one than BTX's, for which our
    coefficient would be wrong. It is used where somebody turns `output_router_logits` on to train.
    """
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **shared_config(model),
        "intermediate_size": model.config["intermediate_size"],
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.num_experts_per_tok,
        "output_router_logits": False,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }


def mixtral_card(model: MergedModel, untrained: Sequence[str] = ()) -> str:
    """Write the model card.

    Args:
        untrained: experts whose router rows nobody has trained yet.
    """
    experts = [(str(number), name) for number, name in enumerate(model.expert_names)]
    of = "" if len(untrained) == model.num_experts else f" of {', '.join(untrained)}"
    warning = f"Its routers{of} are as a merge begins with them. {UNTRAINED}\n\n" if untrained else ""
    return f"""# {in_card(model.located.public_name.rpartition("/")[2])} as a Mixtral

{origin(model, "btx export --format mixtral")}

Its weights are the same bytes under Mixtral's names, and its logits the same bits. A token passes through
{model.num_experts_per_tok} of {counted(model.num_experts, "expert")}:

{markdown_table(("expert", "name"), experts)}
{warning}{how_to_use()}
It needs no code of its own: transformers 4 and 5, vLLM and llama.cpp's converter know a Mixtral.

{CITATION}"""
