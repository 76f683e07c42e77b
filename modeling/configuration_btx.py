"""Configuration of a Branch-Train-MiX model: a Llama whose feed-forward blocks are experts behind a router."""

import math
from typing import Any

import transformers

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        f"A BTX model needs transformers 5 or newer, and this is {transformers.__version__}: "
        "pip install -U transformers"
    )

from transformers import LlamaConfig

ROUTER_TYPES = ("top_k",)


class BTXConfig(LlamaConfig):
    """A `LlamaConfig` with experts (arXiv 2403.07816).

    Args:
        num_local_experts: experts per layer (E), at least 1. Also named `num_experts`.
        num_experts_per_tok: experts that each token is sent to (K), in [1, E].
        router_type: `top_k`, softmax over the K largest router logits.
        router_aux_loss_coef: coefficient of the load balancing loss (the paper's alpha), at least 0. It joins the
            loss in training only.
        output_router_logits: whether the model returns its router logits.
        expert_names: one name per expert, in the order of the router's rows; or None.
        kwargs: everything that `LlamaConfig` takes. `intermediate_size` is the width of one expert.

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
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    def __init__(
        self,
        num_local_experts: int = 4,
        num_experts_per_tok: int = 2,
        router_type: str = "top_k",
        router_aux_loss_coef: float = 0.01,
        output_router_logits: bool = False,
        expert_names: list[str] | None = None,
        **kwargs: Any,
    ):
        if "num_experts" in kwargs:
            self.num_experts = kwargs.pop("num_experts")  # under the name by which an error should call it
        else:
            self.num_local_experts = num_local_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.router_type = router_type
        self.router_aux_loss_coef = router_aux_loss_coef
        self.output_router_logits = output_router_logits
        self.expert_names = expert_names
        super().__init__(**kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        expected = self._complaint(self.attribute_map.get(key, key), value)
        if expected:
            raise ValueError(f"{key} is {value!r}; expected {expected}.")
        super().__setattr__(key, value)

    def _complaint(self, key: str, value: Any) -> str | None:
        """What was expected of an own field; None where the value is good. Unset fields are not compared with."""
        fields = {**self.__dict__, key: value}
        experts, names = fields.get("num_local_experts"), fields.get("expert_names")
        per_token = fields.get("num_experts_per_tok", 1)
        if key == "num_local_experts" and not (_is_int(value) and value >= per_token):
            return f"an integer of at least {per_token}"
        if key == "num_experts_per_tok" and not (_is_int(value) and 1 <= value <= (experts or value)):
            return f"an integer in [1, {experts}], the number of experts"
        if key == "router_type" and value not in ROUTER_TYPES:
            return f"one of {', '.join(ROUTER_TYPES)}"
        if key == "router_aux_loss_coef" and not (_is_number(value) and 0 <= value < math.inf):
            return "a number of at least 0"
        if key == "output_router_logits" and not isinstance(value, bool):
            return "a bool"
        if key == "expert_names" and not (names is None or _is_list_of_text(names)):
            return "a list of names, or None"
        if key in ("expert_names", "num_local_experts") and names is not None and len(names) != experts:
            return f"one expert name for each of the {experts} experts"
        return None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


BTXConfig.register_for_auto_class()
