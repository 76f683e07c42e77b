"""LoRA (arXiv 2106.09685) on a merged model, through PEFT: its routers, what its experts share, or the experts.

`from btx_merge.lora import lora_config`; `import btx_merge` alone imports neither peft nor torch.

Legend: H hidden, I intermediate, E experts, L layers, r rank.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import peft
from peft import LoraConfig

from btx_merge.errors import InputError, Problem

GATE = "mlp.gate"
ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TARGETS: dict[str, dict[str, list[str]]] = {
    "routers": {"target_modules": [GATE]},
    "routers + shared": {"target_modules": [GATE, *ATTENTION]},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
}
"""By the value of `train`: what peft is to find, by the ends of the names."""

# By the model's class. peft trains and saves the head of a classifier beside the LoRA; told otherwise, it would not.
_TASKS = {"BTXForSequenceClassification": "SEQ_CLS", "BTXForTokenClassification": "TOKEN_CLS"}

_OWN = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")
# peft refuses some of the other options for a fused tensor when the model is wrapped (dropout, DoRA), fails on some
# (PiSSA), and passes over the rest without a word: layers_to_transform, exclude_modules, QA-LoRA.
_FOR_EXPERTS = ("init_lora_weights", "modules_to_save", "task_type", "use_rslora")
_INITS_FOR_EXPERTS = (True, False, "gaussian")


def lora_config(train: str, model: object, *, r: int = 16, lora_alpha: float = 32, **options: Any) -> LoraConfig:
    """Return what `peft.get_peft_model` needs to train a part of a BTX model.

    | `train` | LoRA on, in every layer | numbers trained | of Llama-3.2-1B, E = 4, r = 16 |
    |---|---|---|---|
    | `routers` | gate [E, H] | L r (H + E) | 0.5 M, 0.01 % |
    | `routers + shared` | gate; q, k, v and o projections | + L r (in + out) of each | 3.9 M, 0.11 % |
    | `experts` | gate_up_proj [E, 2I, H], down_proj [E, H, I] | L E r (2H + 3I) | 29 M, 0.8 % |

    A gate's rank is r or E, whichever is larger, at the same scale: from rank E on, any router can be learned. The
    gate in `modules_to_save` would be smaller, but peft refuses it alone, and trains it in the model's own dtype,
    bfloat16 as a rule, where small steps are lost; LoRA's matrices are in float32. Embeddings, head and norms stay
    as they are. Norms can be added by `modules_to_save`; a LoRA on an embedding makes peft save the whole table.

    Each expert has a LoRA of rank r of its own. peft adds it to the weights, in their dtype, at every forward pass;
    the sums, as large as all experts together, are kept for the backward pass unless gradient checkpointing is on.

    Args:
        train: `routers`, `routers + shared` or `experts`.
        model: the BTX model, or the config of a language model.
        r: rank, at least 1; of a gate, at least E.
        lora_alpha: what is learned is scaled by lora_alpha / r.
        options: everything else that `LoraConfig` takes; of experts only what peft can do for fused tensors.

    Raises:
        InputError: an unknown `train`, no BTX model, a rank below 1, or an option that would not do what it says.

    Warns:
        UserWarning: the model has a selection bias, which is not part of an adapter.
    """
    config: Any = getattr(model, "config", model)
    problems = []
    if train not in TARGETS:
        problems.append(_problem("train", repr(train), f"one of {', '.join(map(repr, TARGETS))}"))
    if getattr(config, "model_type", None) != "btx":
        problems.append(_problem("model", f"a {type(model).__name__}", "a BTXForCausalLM, or its config"))
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        problems.append(_problem("r", repr(r), "an integer of at least 1"))
    remedy = "Set it on the LoraConfig that comes back, or write one of your own."
    problems += [_problem(name, "is decided by train", "", remedy) for name in _OWN if name in options]
    if train == "experts":
        problems += _problems_of_experts(options)
    if problems:
        raise InputError(problems)
    if getattr(config, "router_selection_bias", False):  # the code in an older checkpoint has none
        warnings.warn(
            "An adapter does not hold the routers' selection bias: if you update it, merge the adapter after "
            "training (`merge_and_unload`) and save the whole model.",
            stacklevel=2,
        )

    targets = {name: list(ends) for name, ends in TARGETS[train].items()}  # the caller's own, to change
    task = _TASKS.get(type(model).__name__, "CAUSAL_LM")
    settings: dict[str, Any] = {"task_type": task, **targets, **options}
    experts: int = config.num_local_experts
    if train != "experts" and experts > r:
        larger = experts / r
        settings["rank_pattern"] = {GATE: experts}
        settings["alpha_pattern"] = {GATE: lora_alpha * (math.sqrt(larger) if options.get("use_rslora") else larger)}
    return LoraConfig(r=r, lora_alpha=lora_alpha, **settings)  # type: ignore[arg-type]  # peft's scaling divides it


def _problems_of_experts(options: dict[str, Any]) -> list[Problem]:
    this = f"peft {peft.__version__}"
    problems = []
    defaults, expected = LoraConfig(), f"of the options only {', '.join(_FOR_EXPERTS)}"
    for name, value in options.items():
        # a value that is peft's default asks for nothing; of a name that peft does not know, peft complains itself
        if name not in (*_FOR_EXPERTS, *_OWN) and getattr(defaults, name, value) != value:
            problems.append(_problem(name, f"{value!r}, which {this} does not apply to fused experts", expected))
    init = options.get("init_lora_weights", True)
    if init not in _INITS_FOR_EXPERTS:
        found = f"{init!r}, which {this} does not apply to fused experts"
        problems.append(_problem("init_lora_weights", found, f"one of {', '.join(map(repr, _INITS_FOR_EXPERTS))}"))
    return problems


def _problem(where: str, found: str, expected: str, remedy: str = "") -> Problem:
    return Problem("lora_config", where, found, expected, remedy)
