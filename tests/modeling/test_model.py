"""What the model computes, against the slow reference and against transformers' Mixtral.

Legend: B batch, T tokens, N = B * T, H hidden, E experts, K experts per token, L layers, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from btx_merge.modeling import BTXForCausalLM
from transformers import MixtralConfig, MixtralForCausalLM

from tests.support.models import EXPERTS, IMPLEMENTATIONS, LLAMA3_ROPE, slow_logits, tiny_btx, tokens, weights_of

VARIANTS = {
    "top 2": {},
    "top 1": {"num_experts_per_tok": 1},
    "all": {"num_experts_per_tok": EXPERTS},
    "one expert": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "wide heads": {"head_dim": 16, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_logits_and_gradients_against_the_slow_reference(variant, implementation):
    """float32 against float64: 1e-5 of the largest value, about ten roundings of a long sum."""
    model = tiny_btx(**VARIANTS[variant])
    model.set_experts_implementation(implementation)
    weights, ids = weights_of(model), tokens()
    expected = slow_logits(model.config, weights, ids)
    ours = model(ids).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(ours.double(), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)

    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * direction).sum().backward()
    (expected * direction.double()).sum().backward()
    for name, parameter in model.named_parameters():
        gradient = weights[name].grad
        assert gradient.abs().max() > 0 or (name.endswith("gate.weight") and model.config.num_experts_per_tok == 1)
        atol = 1e-5 * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(parameter.grad.double(), gradient, atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("experts_per_token", [1, 2, 3, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_with_mixtral(experts_per_token, tied, dtype):
    """transformers' Mixtral: softmax over all, top-k, renormalise. With the same weights the same bits."""
    model = tiny_btx(num_experts_per_tok=experts_per_token, tie_word_embeddings=tied).to(dtype)
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "dtype")}
    theirs = MixtralForCausalLM(MixtralConfig(**config, sliding_window=None)).to(dtype).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    ids = tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        ours = model(ids, attention_mask=mask).logits
        assert torch.equal(model(ids[:1, :1]).logits, theirs(ids[:1, :1]).logits)  # has a way of its own
    assert expected.abs().max() > 1
    assert torch.equal(ours, expected)
    torch.testing.assert_close(
        model.generate(ids[:, :5], max_new_tokens=8, do_sample=False),
        theirs.generate(ids[:, :5], max_new_tokens=8, do_sample=False),
    )


# --- checkpointing ---------------------------------------------------------------------------------------------


def gradients_of(model: BTXForCausalLM) -> dict[str, torch.Tensor]:
    ids = tokens()
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


SWITCHES = [name for name in ("gradient", "activation") if hasattr(BTXForCausalLM, f"{name}_checkpointing_enable")]


def switch_on(model: BTXForCausalLM, name: str, kwargs: dict | None) -> None:
    getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": kwargs})


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}])
def test_gradient_checkpointing_gives_the_same_gradients(switch, kwargs):
    """The same operations are run again: equal to the last bit, up to the order in which experts are added."""
    model = tiny_btx(router_aux_loss_coef=1.0).train()
    expected = gradients_of(model)
    switch_on(model, switch, kwargs)
    assert model.model.layers[0].gradient_checkpointing
    ours = gradients_of(model)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], atol=1e-6, rtol=1e-5)
    without_balancing = tiny_btx(router_aux_loss_coef=0.0).train()
    name = "model.layers.0.mlp.gate.weight"
    assert (gradients_of(without_balancing)[name] - expected[name]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize(
    "kwargs", [{"use_reentrant": True}, {}, {"preserve_rng_state": True}, {"use_reentrant": None}]
)
def test_reentrant_checkpointing_is_refused(switch, kwargs):
    """torch's default is reentrant, so leaving it open is refused too: PEFT calls with an empty dict."""
    model = tiny_btx().train()
    with pytest.raises(ValueError, match=r"routers' gradients.*'use_reentrant': False"):
        switch_on(model, switch, kwargs)
    with pytest.raises(ValueError, match="use_reentrant"):
        switch_on(model.model, switch, kwargs)
    assert not model.model.layers[0].gradient_checkpointing


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_(en|dis)able. is deprecated")
def test_gradient_checkpointing_can_be_switched_off():
    model = tiny_btx().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.gradient_checkpointing_disable()
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


# --- experts' implementations, and using a model ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_token", [1, 2, 4])
def test_experts_implementations_agree(dtype, per_token):
    """float32: the order of a sum. bf16: a few of its roundings, 2**-8 each, on logits of up to about 5."""
    model = tiny_btx(num_experts_per_tok=per_token)
    assert model.config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        exact = model(tokens()).logits
        model.to(dtype)
        outputs = {}
        for implementation in IMPLEMENTATIONS:
            model.set_experts_implementation(implementation)
            outputs[implementation] = model(tokens()).logits
            assert outputs[implementation].dtype == dtype
    if dtype == torch.float32:
        for output in outputs.values():
            torch.testing.assert_close(output, exact, atol=1e-5, rtol=0)
    else:  # a token may choose another expert where two router logits are close: the median is what bf16 costs
        for output in outputs.values():
            assert (output.float() - exact).abs().median() < 8 * 2**-8


def test_eager_forward_runs_no_expert_without_tokens():
    """An expert that nobody chooses gets a gradient of zero, not none: optimisers and DDP need that."""
    model = tiny_btx(num_experts_per_tok=1)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = layer.mlp.gate.weight[:3].mean(dim=0)  # never the largest
    model(tokens()).logits.sum().backward()
    gradient = model.model.layers[0].mlp.experts.down_proj.grad
    assert not gradient[3].any()
    assert gradient[:3].any()


def test_another_number_of_experts_per_token_takes_effect_on_a_loaded_model(tmp_path):
    tiny_btx().save_pretrained(tmp_path)
    model = BTXForCausalLM.from_pretrained(tmp_path)
    ids = tokens()
    with torch.no_grad():
        for per_token in (1, 2, 3, 4):
            model.config.num_experts_per_tok = per_token
            expected = slow_logits(model.config, weights_of(model), ids)
            torch.testing.assert_close(model(ids).logits.double(), expected, atol=1e-4, rtol=0)
        at_load = BTXForCausalLM.from_pretrained(tmp_path, num_experts_per_tok=1)
        with_all = model.generate(ids, max_new_tokens=6, do_sample=False)
        model.config.num_experts_per_tok = 1
        torch.testing.assert_close(at_load(ids).logits, model(ids).logits)
        generated = model.generate(ids, max_new_tokens=6, do_sample=False)
        torch.testing.assert_close(at_load.generate(ids, max_new_tokens=6, do_sample=False), generated)
        assert generated.shape != with_all.shape or not torch.equal(generated, with_all)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks for it
def test_router_logits_are_the_ones_that_route_also_under_a_lora():
    """Recorded at the gate, a LoRA on the gate would be missing from them, and from the balancing loss."""
    from peft import LoraConfig, get_peft_model

    model = tiny_btx(router_aux_loss_coef=1.0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["gate"], init_lora_weights=False))
    inputs = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    out = adapted(tokens(), output_router_logits=True)
    for layer, hidden, logits in zip(model.model.layers, inputs, out.router_logits, strict=True):
        gate = layer.mlp.gate
        delta = gate.scaling["default"] * gate.lora_B["default"].weight @ gate.lora_A["default"].weight
        expected = hidden @ (gate.base_layer.weight + delta).T
        assert delta.abs().max() > 0.01
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    adapted.train()(tokens(), labels=tokens()).loss.backward()
    assert model.model.layers[0].mlp.gate.lora_A["default"].weight.grad.abs().max() > 0
