"""LoRA on a merged model through the real peft, against weights merged by hand and plain autograd.

Legend: H hidden, I intermediate, E experts, L layers, r rank.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from btx_merge.modeling import BTXConfig, BTXForCausalLM
from peft import (
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)

from btx_merge.lora import TARGETS, lora_config
from tests.support.common import raw_bytes
from tests.support.models import EXPERTS, IMPLEMENTATIONS, slow_balancing_loss, slow_logits, tiny_btx, tokens

# What peft and transformers say to who trains is not about us; peft asks for deprecated names of transformers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:::transformers"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
]
RANK, ALPHA = 3, 5  # a gate's rank is EXPERTS = 4; every scale is 5 / 3
every_part = pytest.mark.parametrize("train", list(TARGETS))
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MODULES = {
    "routers": ["mlp.gate"],
    "routers + shared": ["mlp.gate", *ATTENTION],
    "experts": ["mlp.experts", "mlp.experts.base_layer"],  # peft's wrapper of down_proj, around gate_up_proj's
}


def base(implementation: str = "grouped_mm", **changes: Any) -> BTXForCausalLM:
    """The same weights at every call, and a balancing loss that counts."""
    model = tiny_btx(router_aux_loss_coef=1.0, **changes)
    model.set_experts_implementation(implementation)
    return model


def randomise(model: torch.nn.Module, seed: int = 7) -> None:
    """LoRA matrices with which every product matters; peft starts B at 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapted(
    train: str, implementation: str = "grouped_mm", changes: dict[str, Any] | None = None, **options: Any
) -> PeftModel:
    model = base(implementation, **(changes or {}))
    wrapped = get_peft_model(model, lora_config(train, model, r=RANK, lora_alpha=ALPHA, **options)).eval()
    randomise(wrapped)
    return wrapped


def lora_names(train: str, adapter: str = ".default") -> set[str]:
    return {
        f"base_model.model.model.layers.{layer}.{module}.lora_{factor}{adapter}.weight"
        for layer in (0, 1)
        for module in MODULES[train]
        for factor in "AB"
    }


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def values(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: raw_bytes(parameter.detach()) for name, parameter in model.named_parameters()}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=tokens()).logits


# --- the slow reference: W + alpha / r * B A, by plain autograd --------------------------------------------------


def by_hand(
    model: PeftModel, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Every weight of the plain model by its own name, and the factors A and B that they are computed from."""
    factors, weights = {}, {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            factors[name] = parameter.detach().to(dtype).requires_grad_()
        else:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            weights[plain] = parameter.detach().to(dtype)
    for name in [name for name in factors if ".lora_A." in name]:
        down, up = factors[name], factors[name.replace("lora_A", "lora_B")]
        module = name.removeprefix("base_model.model.").split(".lora_A.")[0]
        if module.endswith("mlp.experts.base_layer"):
            target, delta = module.replace("base_layer", "gate_up_proj"), fused_product(down, up)
        elif module.endswith("mlp.experts"):
            target, delta = f"{module}.down_proj", fused_product(down, up)
        else:
            target, delta = f"{module}.weight", up @ down
        assert delta.abs().max() > 0.1
        weights[target] = weights[target] + ALPHA / RANK * delta
    return weights, factors


def fused_product(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """A [E r, in] holds expert after expert, B [out, r E] rank after rank. The deltas [E, out, in]."""
    own = down.split(RANK)
    return torch.stack([up[:, expert::EXPERTS] @ own[expert] for expert in range(EXPERTS)])


@every_part
@every_implementation
def test_logits_and_gradients_against_the_slow_reference(train, implementation):
    """float32 against float64: 1e-5 of the largest value, about ten roundings of a long sum."""
    model = adapted(train, implementation)
    weights, factors = by_hand(model)
    expected = slow_logits(model.config, weights, tokens())
    ours = model(input_ids=tokens()).logits
    assert (ours - logits(base())).abs().max() > 0.1
    torch.testing.assert_close(ours.double(), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)

    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * direction).sum().backward()
    (expected * direction.double()).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == factors.keys() == lora_names(train)
    for name, factor in factors.items():
        largest = factor.grad.abs().max().item()
        assert largest > 0.1
        torch.testing.assert_close(gradients[name].double(), factor.grad, atol=1e-5 * largest, rtol=0, msg=name)


@every_part
@every_implementation
def test_router_logits_and_balancing_loss_against_weights_merged_by_hand(train, implementation):
    """Loss, balancing loss, what is recorded, and the gradient of the whole training loss."""
    model, ids = adapted(train, implementation), tokens()
    weights, factors = by_hand(model, torch.float32)
    inputs = {"labels": ids, "output_router_logits": True, "use_cache": False}
    expected = torch.func.functional_call(base(implementation).train(), weights, (ids,), inputs)
    ours = model.train()(input_ids=ids, **inputs)
    torch.testing.assert_close(ours.loss, expected.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.aux_loss, expected.aux_loss, atol=1e-5, rtol=0)
    recorded = slow_balancing_loss(model.config, [layer.detach().double() for layer in ours.router_logits])
    torch.testing.assert_close(ours.aux_loss.double(), recorded, atol=0, rtol=1e-5)
    unadapted = base()(ids, output_router_logits=True).router_logits
    for mine, reference, without in zip(ours.router_logits, expected.router_logits, unadapted, strict=True):
        torch.testing.assert_close(mine, reference, atol=2e-5, rtol=0)  # of up to about 10
        assert (mine - without).abs().max() > 0.1 or train == "experts"  # not seen by the first router

    ours.loss.backward()
    expected.loss.backward()
    for name, parameter in model.named_parameters():
        if name in factors:
            largest = factors[name].grad.abs().max().item()
            assert largest > 1e-3
            torch.testing.assert_close(parameter.grad, factors[name].grad, atol=2e-5 * largest, rtol=0, msg=name)


ROUTINGS = {
    "switch": {"router_type": "switch"},
    "soft": {"router_type": "soft"},
    "sample top 1": {"router_type": "sample_top_1"},
    "softmax first": {"router_pre_softmax": True},
    "dense gradient": {"router_grad": "dense"},
    "dense gradient, switch": {"router_grad": "dense", "router_type": "switch"},
    "z-loss": {"router_z_loss_coef": 0.1},
    "some experts": {"active_experts": [0, 2, 3]},
}


@every_part
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_every_routing_against_weights_merged_by_hand(train, routing):
    """Loss in training and its gradients. The same seed before both, for routings that sample."""
    changes = ROUTINGS[routing]
    model, ids = adapted(train, changes=changes), tokens()
    weights, factors = by_hand(model, torch.float32)
    inputs, plain = {"labels": ids, "use_cache": False}, base(**changes).train()
    torch.manual_seed(3)
    expected = torch.func.functional_call(plain, weights, (ids,), inputs).loss
    torch.manual_seed(3)
    ours = model.train()(input_ids=ids, **inputs).loss
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    ours.backward()
    expected.backward()
    for name, factor in factors.items():
        largest = factor.grad.abs().max().item()
        assert largest > 1e-3
        torch.testing.assert_close(model.get_parameter(name).grad, factor.grad, atol=2e-5 * largest, rtol=0, msg=name)


@every_part
def test_experts_per_token_and_active_experts_of_a_call(train):
    model = adapted(train)
    call = {"input_ids": tokens(), "num_experts_per_tok": 1, "active_experts": [1, 2]}
    with torch.no_grad():
        ours, without = model(**call).logits, model(input_ids=tokens()).logits
        assert (ours - without).abs().max() > 0.1
        model.set_active_experts([1, 2])
        del call["active_experts"]
        assert torch.equal(model(**call).logits, ours)
        torch.testing.assert_close(model.merge_and_unload()(**call).logits, ours, atol=1e-5, rtol=1e-5)


# --- what is trained ---------------------------------------------------------------------------------------------


@every_part
@every_implementation
def test_a_step_changes_the_lora_matrices_and_nothing_else(train, implementation):
    model = adapted(train, implementation).train()
    assert trainable(model) == lora_names(train)
    before = values(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    optimizer.step()
    after = values(model)
    assert {name for name in before if before[name] != after[name]} == lora_names(train)


@every_part
def test_a_new_adapter_changes_nothing_yet(train):
    model = base()
    expected = logits(model)
    wrapped = get_peft_model(model, lora_config(train, model))
    assert torch.equal(logits(wrapped), expected)


def test_norms_and_gates_in_full_beside_the_experts():
    model = base()
    config = lora_config("experts", model, modules_to_save=["post_attention_layernorm", "gate"])
    wrapped = get_peft_model(model, config)
    saved = {
        f"base_model.model.model.layers.{layer}.{module}.modules_to_save.default.weight"
        for layer in (0, 1)
        for module in ("post_attention_layernorm", "mlp.gate")
    }
    assert trainable(wrapped) == lora_names("experts") | saved


def test_routers_alone_without_peft():
    """Freeze all, then let the gates learn. The optimiser is given what is left to train."""
    model = base().train()
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.gate.requires_grad_(True)
    gates = {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)}
    assert trainable(model) == gates
    before = values(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    after = values(model)
    assert {name for name in before if before[name] != after[name]} == gates


@pytest.mark.parametrize("rslora", [False, True])
def test_a_gate_has_its_full_rank_at_the_scale_of_the_rest(rslora):
    model = base()
    for rank, expected in ((2, EXPERTS), (EXPERTS, EXPERTS), (6, 6)):
        config = lora_config("routers + shared", model.config, r=rank, lora_alpha=3, use_rslora=rslora)
        wrapped = get_peft_model(base(), config)
        layer = wrapped.base_model.model.model.layers[1]
        assert layer.mlp.gate.r["default"] == expected
        assert layer.self_attn.q_proj.r["default"] == rank
        scale = 3 / (rank**0.5 if rslora else rank)
        assert layer.mlp.gate.scaling["default"] == pytest.approx(scale)
        assert layer.self_attn.q_proj.scaling["default"] == pytest.approx(scale)


@every_part
def test_lora_is_in_float32_on_a_bf16_model(train):
    """A step of 5e-5 would be lost on a bf16 weight of 0.02: half a unit of its last place is 6e-5."""
    model = base().bfloat16()
    wrapped = get_peft_model(model, lora_config(train, model)).train()
    randomise(wrapped)
    out = wrapped(input_ids=tokens(), labels=tokens())
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    for name, parameter in wrapped.named_parameters():
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)
        assert not parameter.requires_grad or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("train", "millions", "percent"),
    [("routers", 0.5, 0.01), ("routers + shared", 3.9, 0.11), ("experts", 29, 0.8)],
)
def test_the_numbers_in_the_docstring(train, millions, percent):
    sizes = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}
    config = BTXConfig(**sizes, **heads, num_local_experts=4)
    with torch.device("meta"):
        model = get_peft_model(BTXForCausalLM(config), lora_config(train, config, r=16))
    trained, total = model.get_nb_trainable_parameters()
    assert trained / 1e6 == pytest.approx(millions, rel=0.06)
    assert 100 * trained / total == pytest.approx(percent, rel=0.5)
    assert f"{millions} M, {percent} %" in lora_config.__doc__
    shared = 16 * (2 * (2048 + 2048) + 2 * (2048 + 512))
    per_layer = {
        "routers": 16 * (2048 + 4),
        "routers + shared": 16 * (2048 + 4) + shared,
        "experts": 4 * 16 * (2 * 2048 + 3 * 8192),
    }
    assert trained == 16 * per_layer[train]


# --- gradient checkpointing --------------------------------------------------------------------------------------

NON_REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}


def gradients_of(model: PeftModel) -> dict[str, torch.Tensor]:
    model.train()(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def switched_on(train: str, implementation: str, when: str) -> PeftModel:
    model = base(implementation)
    if when == "before":
        model.gradient_checkpointing_enable(**NON_REENTRANT)
    if when == "prepared":  # as peft does for a quantised model
        model.is_loaded_in_8bit = True
        model = prepare_model_for_kbit_training(model, **NON_REENTRANT)
        model.is_loaded_in_8bit = False
    wrapped = get_peft_model(model, lora_config(train, model, r=RANK, lora_alpha=ALPHA))
    randomise(wrapped)
    if when == "after":
        wrapped.gradient_checkpointing_enable(**NON_REENTRANT)
    return wrapped


@every_part
@every_implementation
@pytest.mark.parametrize("when", ["before", "after", "prepared"])
def test_gradient_checkpointing_gives_the_same_gradients(train, implementation, when):
    expected = gradients_of(adapted(train, implementation))
    model = switched_on(train, implementation, when)
    assert model.get_base_model().model.layers[0].gradient_checkpointing
    ours = gradients_of(model)
    assert ours.keys() == expected.keys() == lora_names(train)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-5)


def test_pefts_preparation_says_that_reentrant_checkpointing_is_refused():
    """peft leaves it open, and torch's default is reentrant: without it, only with the argument."""
    model = base()
    model.is_loaded_in_8bit = True
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        prepare_model_for_kbit_training(model)
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
