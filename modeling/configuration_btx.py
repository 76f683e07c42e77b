"""Configuration of a Branch-Train-MiX model: a Llama whose feed-forward blocks are experts behind a router."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import transformers

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        f"A BTX model needs transformers 5 or newer, and this is {transformers.__version__}: "
        "pip install -U transformers"
    )

from transformers import LlamaConfig

ROUTER_TYPES = ("top_k", "switch", "soft", "sample_top_1")
_Rule = tuple[str, Callable[[Any], bool]]
"""What is expected of a field, and whether a value is that."""


class BTXConfig(LlamaConfig):
    """A `LlamaConfig` with experts (arXiv 2403.07816).

    Args:
        num_local_experts: experts per layer (E), at least 1. Also named `num_experts`.
        num_experts_per_tok: experts that each token is sent to by `top_k` (K), in [1, E].
        router_type: `top_k`, softmax over the K largest router logits; `switch`, the likeliest expert, weighted with
            its probability; `soft`, all experts; `sample_top_1`, one expert drawn in training by Gumbel-softmax, the
            likeliest in inference (its first layer is soft).
        router_pre_softmax: `top_k` only: softmax over all experts before the selection, with the weights scaled by
            the constant E * num_chunks / K instead of renormalised, so that identical experts with a router of
            zeros give their dense layer (arXiv 2410.07524).
        num_chunks: how many experts each source's feed-forward block was cut into, at least 1.
        expert_capacity_factor: `switch` in training: an expert takes `ceil(factor * N / E)` of N tokens, above 0;
            later ones pass it by. None for no limit.
        router_grad: `sparse`, or `dense`: in training every expert runs and the routers get the gradient of the
            mixture of all, while the output stays that of the chosen (DenseMixer). Inference is the same.
        router_selection_bias: `top_k` and `switch`: experts are ranked with a bias that
            `model.update_router_bias` moves towards balance without a loss (arXiv 2408.15664).
        router_aux_loss_coef: coefficient of the load balancing loss (the paper's alpha), at least 0. It joins the
            loss in training only.
        router_aux_loss_scope: `micro_batch`, or `global_batch`: balance over all ranks and over the micro-batches
            that are accumulated for one optimizer step (arXiv 2501.11873).
        router_z_loss_coef: coefficient of the router z-loss (arXiv 2202.08906), at least 0.
        output_router_logits: whether the model returns its router logits.
        expert_names: one name per expert, in the order of the router's rows; or None.
        active_experts: names or numbers of the experts that tokens are sent to; None for all.
        kwargs: everything that `LlamaConfig` takes. `intermediate_size` is the width of one expert. `mlp_bias` must
            be False.

    Raises:
        ValueError: a value that is out of range, also when it is assigned later.
    """

    model_type = "btx"
    attribute_map = {"num_experts": "num_local_experts"}
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_ep_plan: ClassVar[dict[str, Any]] = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    def __init__(
        self,
        num_local_experts: int = 4,
        num_experts_per_tok: int = 2,
        router_type: str = "top_k",
        router_pre_softmax: bool = False,
        num_chunks: int = 1,
        expert_capacity_factor: float | None = 1.5,
        router_grad: str = "sparse",
        router_selection_bias: bool = False,
        router_aux_loss_coef: float = 0.01,
        router_aux_loss_scope: str = "micro_batch",
        router_z_loss_coef: float = 0.0,
        output_router_logits: bool = False,
        expert_names: list[str] | None = None,
        active_experts: list[str | int] | None = None,
        **kwargs: Any,
    ):
        if "num_experts" in kwargs:
            self.num_experts = kwargs.pop("num_experts")  # under the name by which an error should call it
        else:
            self.num_local_experts = num_local_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.router_type = router_type
        self.router_pre_softmax = router_pre_softmax
        self.num_chunks = num_chunks
        self.expert_capacity_factor = expert_capacity_factor
        self.router_grad = router_grad
        self.router_selection_bias = router_selection_bias
        self.router_aux_loss_coef = router_aux_loss_coef
        self.router_aux_loss_scope = router_aux_loss_scope
        self.router_z_loss_coef = router_z_loss_coef
        self.output_router_logits = output_router_logits
        self.expert_names = expert_names
        self.active_experts = active_experts
        super().__init__(**kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        self.check(key, value)
        super().__setattr__(key, value)

    def check(self, key: str, value: Any) -> None:
        """Check whether a field may have this value, given the others.

        Raises:
            ValueError: it may not.
        """
        expected = self._complaint(self.attribute_map.get(key, key), value)
        if expected:
            raise ValueError(f"{key} is {value!r}; expected {expected}.")

    def expert_numbers(self, experts: Sequence[str | int] | None) -> list[int]:
        """Return the numbers of experts given by name or number, in ascending order; of all for None.

        Raises:
            ValueError: an expert that there is not, or none.
        """
        if experts is None:
            return list(range(self.num_local_experts))
        self.check("active_experts", experts)
        names = self.expert_names or []
        return sorted({names.index(expert) if isinstance(expert, str) else expert for expert in experts})

    def _complaint(self, key: str, value: Any) -> str | None:
        """Return what was expected of a field; None where the value is good. Unset fields are not compared with."""
        fields = {**self.__dict__, key: value}  # while `__init__` runs, only those that are set already
        experts, names = fields.get("num_local_experts"), fields.get("expert_names")
        per_token = fields.get("num_experts_per_tok", 1)
        if key in _SIMPLE and not _SIMPLE[key][1](value):
            return _SIMPLE[key][0]
        ranked = fields.get("router_type") in (None, "top_k", "switch")
        has_useless_bias = fields.get("router_selection_bias") and not ranked  # nothing is ranked by it
        if key == "router_type" and has_useless_bias:
            return "top_k or switch where router_selection_bias is on"
        if key == "router_selection_bias" and has_useless_bias:
            return "False except with top_k or switch"
        if key == "num_local_experts" and not (_is_int(value) and value >= per_token):
            return f"an integer of at least {per_token}"
        if key == "num_experts_per_tok" and not (_is_int(value) and 1 <= value <= (experts or value)):
            return f"an integer in [1, {experts}], the number of experts"
        if key == "expert_names" and not (names is None or _is_list_of_text(names)):
            return "a list of names, or None"
        if key in ("expert_names", "num_local_experts") and names is not None and len(names) != experts:
            return f"one expert name for each of the {experts} experts"
        active = fields.get("active_experts")
        if key in ("active_experts", "expert_names", "num_local_experts") and not _are_experts(active, experts, names):
            if key != "active_experts":
                return f"one that has the active experts {active}"
            known = f"name ({', '.join(names)}) or " if names else ""
            return f"a list of different experts, by {known}number in [0, {experts})"
        return None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _are_experts(value: Any, experts: int | None, names: Sequence[str] | None) -> bool:
    if value is None:
        return True
    if not isinstance(value, (list, tuple)) or not value or len(set(map(str, value))) < len(value):
        return False
    for item in value:
        if isinstance(item, str) and item not in (names or ()):
            return False
        if not isinstance(item, str) and not (_is_int(item) and 0 <= item < (experts or 0)):
            return False
    return True


def _choice(*values: str) -> _Rule:
    return f"one of {', '.join(values)}", lambda value: value in values


_BOOL: _Rule = ("a bool", lambda value: isinstance(value, bool))
_COEFFICIENT: _Rule = ("a number of at least 0", lambda value: _is_number(value) and value >= 0)
_SIMPLE: dict[str, _Rule] = {  # of fields that depend on no other
    "router_type": _choice(*ROUTER_TYPES),
    "router_pre_softmax": _BOOL,
    "num_chunks": ("an integer of at least 1", lambda value: _is_int(value) and value >= 1),
    "expert_capacity_factor": (
        "a number above 0, or None",
        lambda value: value is None or (_is_number(value) and value > 0),
    ),
    "router_grad": _choice("sparse", "dense"),
    "router_selection_bias": _BOOL,
    "router_aux_loss_coef": _COEFFICIENT,
    "router_aux_loss_scope": _choice("micro_batch", "global_batch"),
    "router_z_loss_coef": _COEFFICIENT,
    "output_router_logits": _BOOL,
    "mlp_bias": ("False: experts have no biases", lambda value: value is False),
}

BTXConfig.register_for_auto_class()
