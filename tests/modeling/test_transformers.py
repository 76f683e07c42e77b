"""What transformers promises of a causal language model's forward and backward pass, kept by ours.

Where "as Llama" is claimed, all experts are copies of one feed-forward block: whatever the router does, its weights
add up to 1, so the model must be the dense Llama with that block.

Legend: B batch, T tokens, N = B * T, H hidden, E experts, L layers, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from btx_merge.modeling import BTXForCausalLM, BTXModel
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.support.models import EXPERTS, LLAMA3_ROPE, tiny_btx, tokens


def dense_and_identical_experts(**changes: Any) -> tuple[LlamaForCausalLM, BTXForCausalLM]:
    ours = tiny_btx(**changes)
    weights = ours.state_dict()
    for name in list(weights):
        if name.endswith("experts.gate_up_proj"):
            weights[name].copy_(weights[name][:1].expand_as(weights[name]))
            gate, up = weights.pop(name)[0].chunk(2)
            weights |= {name.replace("experts.gate_up_proj", "gate_proj.weight"): gate}
            weights |= {name.replace("experts.gate_up_proj", "up_proj.weight"): up}
        elif name.endswith("experts.down_proj"):
            weights[name].copy_(weights[name][:1].expand_as(weights[name]))
            weights[name.replace("experts.down_proj", "down_proj.weight")] = weights.pop(name)[0]
        elif name.endswith("mlp.gate.weight"):
            del weights[name]
    config = {key: value for key, value in ours.config.to_dict().items() if key not in ("model_type", "architectures")}
    dense = LlamaForCausalLM(LlamaConfig(**config)).eval()
    dense.load_state_dict(weights)
    return dense, ours


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """1e-5 of the largest value of each: the order of long sums."""
    for name, gradient in expected.items():
        atol = 1e-5 * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(ours[name], gradient, atol=atol, rtol=0, msg=lambda text, name=name: name + text)


# --- as Llama --------------------------------------------------------------------------------------------------

ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": LLAMA3_ROPE,
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


def test_every_kind_of_rope_is_listed():
    assert set(ROPES) >= set(ROPE_INIT_FUNCTIONS)


@pytest.mark.parametrize("kind", [kind for kind in ROPES if kind in {"default", *ROPE_INIT_FUNCTIONS}])
def test_every_kind_of_rope_as_llama(kind):
    """Texts below and above the length of training, in turn, for some kinds remember the longest."""
    rope = {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}}
    length = {"max_position_embeddings": 16 if kind == "dynamic" else 64}
    dense, ours = dense_and_identical_experts(**rope, **length, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        for size in (40, 7, 30, 48):
            logits = ours(tokens(2, size)).logits
            torch.testing.assert_close(logits, dense(tokens(2, size)).logits, atol=1e-5, rtol=0)
        default = tiny_btx()
        default.load_state_dict(ours.state_dict())
        assert (kind == "default") == torch.equal(default(tokens(2, 48)).logits, logits)
    options = {"max_new_tokens": 12, "do_sample": False}
    torch.testing.assert_close(ours.generate(tokens(2, 10), **options), dense.generate(tokens(2, 10), **options))


OPTIONS = {
    "biases in attention": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "as many keys as queries": {"num_key_value_heads": 4},
    "one key": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 16},
    "gelu": {"hidden_act": "gelu"},
    "large epsilon": {"rms_norm_eps": 0.1},
    "one layer": {"num_hidden_layers": 1},
    "rope as of old": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0},
}


@pytest.mark.parametrize("option", list(OPTIONS))
def test_options_of_the_config_as_llama(option):
    dense, ours = dense_and_identical_experts(**OPTIONS[option])
    ids = tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, 15:] = 0
    expected, out = dense(ids, attention_mask=mask, labels=ids), ours(ids, attention_mask=mask, labels=ids)
    assert expected.logits.abs().max() > 1
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=0)
    shared = [name for name, _ in dense.named_parameters() if "mlp" not in name]
    theirs, mine = gradients(dense, expected.loss), gradients(ours, out.loss)
    assert_same_gradients({name: mine[name] for name in shared}, {name: theirs[name] for name in shared})


def test_positions_that_restart_are_separate_texts():
    """Packed in one row without a mask, as a data collator without padding does it."""
    dense, ours = dense_and_identical_experts()
    first, second = tokens(1, 7), tokens(1, 5)
    row = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    with torch.no_grad():
        packed = ours(row, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed[:, :7], ours(first).logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(packed[:, 7:], ours(second).logits, atol=1e-5, rtol=0)
        expected = dense(row, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed, expected, atol=1e-5, rtol=0)
        shifted = torch.arange(12)[None] * 2
        torch.testing.assert_close(
            ours(row, position_ids=shifted).logits, dense(row, position_ids=shifted).logits, atol=1e-5, rtol=0
        )
        assert (ours(row, position_ids=shifted).logits - ours(row).logits).abs().max() > 1e-2


# --- inputs and outputs ----------------------------------------------------------------------------------------


def test_embeddings_in_place_of_ids():
    model = tiny_btx()
    ids = tokens()
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits, atol=0, rtol=0)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="input_ids"):
            model(**inputs)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_a_row_does_not_depend_on_its_batch(implementation):
    """Nor one call on another. Experts are shared between rows: the order of a sum may change, nothing else."""
    model = tiny_btx()
    model.set_experts_implementation(implementation)
    ids = tokens(4, 11)
    with torch.no_grad():
        together = model(ids).logits
        torch.testing.assert_close(model(ids).logits, together, atol=0, rtol=0)
        for row in range(4):
            torch.testing.assert_close(model(ids[row, None]).logits[0], together[row], atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("by", ["call", "config"])
def test_hidden_states_attentions_and_router_logits(by, head):
    model = tiny_btx(attn_implementation="eager")
    model = model if head else model.model
    asked = {f"output_{kind}": True for kind in ("hidden_states", "attentions", "router_logits")}
    plain = model(tokens())
    assert (plain.hidden_states, plain.attentions, plain.get("router_logits")) == (None, None, None)
    if by == "config":
        for name in asked:
            setattr(model.config, name, True)
    out = model(tokens(), **(asked if by == "call" else {}))
    assert [tuple(state.shape) for state in out.hidden_states] == [(2, 11, 32)] * 3
    assert [tuple(layer.shape) for layer in out.attentions] == [(2, 4, 11, 11)] * 2
    assert [tuple(layer.shape) for layer in out.router_logits] == [(22, EXPERTS)] * 2
    torch.testing.assert_close(out.hidden_states[0], model.get_input_embeddings()(tokens()))
    if head:
        torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)  # the last is normed
    else:
        torch.testing.assert_close(out.hidden_states[-1], out.last_hidden_state)
    for layer in out.attentions:
        torch.testing.assert_close(layer.sum(dim=-1), torch.ones(2, 4, 11))
        assert not layer.triu(1).any()
    if by == "config":
        off = model(tokens(), **dict.fromkeys(asked, False))
        assert (off.hidden_states, off.attentions, off.get("router_logits")) == (None, None, None)


@pytest.mark.parametrize("head", [True, False])
def test_an_output_can_be_taken_apart_and_put_together(head):
    """As FSDP and torch.export do with what a module returns: every value is a field that its class declares."""
    model = tiny_btx(attn_implementation="eager")
    model = model if head else model.model
    assert model(tokens()).router_logits is None
    asked = {f"output_{kind}": True for kind in ("hidden_states", "attentions", "router_logits")}
    out = model(tokens(), **asked)
    again = torch.utils._pytree.tree_map(lambda value: value, out)
    assert type(again) is type(out)
    assert list(again) == list(out)
    torch.testing.assert_close(again.router_logits, out.router_logits)


def test_some_hidden_states_only():
    output_capturing = pytest.importorskip("transformers.utils.output_capturing")
    if not hasattr(output_capturing, "resolve_hidden_states_indices"):
        pytest.skip("this transformers returns all hidden states or none")
    model = tiny_btx()
    every = model(tokens(), output_hidden_states=True).hidden_states
    some = model(tokens(), output_hidden_states=[0, -1]).hidden_states
    assert some[1] is None
    torch.testing.assert_close((some[0], some[2]), (every[0], every[2]))


@pytest.mark.parametrize("head", [True, False])
def test_a_tuple_has_what_the_dictionary_has(head):
    model = tiny_btx(attn_implementation="eager").train()
    asked = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    asked |= {"labels": tokens(), "use_cache": False} if head else {"use_cache": False}
    model = model if head else model.model
    for some in ({}, {"use_cache": False}, asked):
        named = model(tokens(), **some)
        unnamed = model(tokens(), **some, return_dict=False)
        assert isinstance(unnamed, tuple)
        assert [type(value) for value in unnamed] == [type(value) for value in named.values()]
        for ours, expected in zip(unnamed, named.values(), strict=True):
            if isinstance(ours, (torch.Tensor, tuple)):  # a cache cannot be compared
                torch.testing.assert_close(ours, expected)
    first = ["loss", "aux_loss", "logits"] if head else ["last_hidden_state"]
    assert list(named) == [*first, "hidden_states", "attentions", "router_logits"]


def test_logits_of_some_tokens():
    model = tiny_btx()
    whole = model(tokens()).logits
    for kept, expected in ((0, whole), (1, whole[:, -1:]), (3, whole[:, -3:])):
        torch.testing.assert_close(model(tokens(), logits_to_keep=kept).logits, expected)
    chosen = torch.tensor([0, 4, 10])
    torch.testing.assert_close(model(tokens(), logits_to_keep=chosen).logits, whole[:, chosen])


def test_labels_that_are_shifted_already():
    """As context parallelism passes them: a part of a text cannot know the token after its last."""
    model = tiny_btx()
    ids, aligned = tokens(), tokens(3, 11)[1:]
    out = model(ids, labels=ids, shift_labels=aligned)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits.flatten(0, 1), aligned.flatten()))
    torch.testing.assert_close(model(ids, labels=ids.flip(1), shift_labels=aligned).loss, out.loss)


def test_micro_batches_of_labels_that_are_shifted_already():
    """The balancing loss's share of an accumulated batch counts the labels that the loss counts."""
    model = tiny_btx(router_aux_loss_coef=1.0).train()
    ids, aligned = tokens(), tokens(3, 11)[1:].clone()
    aligned[1, :8] = -100
    parts = [model(ids[row, None], labels=ids[row, None], shift_labels=aligned[row, None]) for row in range(2)]
    expected = sum(count / 14 * part.loss for count, part in zip((11, 3), parts, strict=True))
    together = sum(
        model(
            ids[row, None], labels=ids[row, None], shift_labels=aligned[row, None], num_items_in_batch=torch.tensor(14)
        ).loss
        for row in range(2)
    )
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Throughout: forward, backward, generation. Within a few roundings, for all but the tokens that a router's
    rounding sends elsewhere."""
    model = tiny_btx()
    exact = model(tokens()).logits
    model = model.to(dtype)
    out = model(tokens(), labels=tokens(), output_hidden_states=True)
    assert {out.logits.dtype, *(state.dtype for state in out.hidden_states)} == {dtype}
    assert (out.logits.float() - exact).abs().median() < 8 * torch.finfo(dtype).eps
    found = gradients(model, out.loss)
    assert all(gradient.dtype == dtype and torch.isfinite(gradient).all() for gradient in found.values())
    assert model.generate(tokens(), max_new_tokens=4, min_new_tokens=4, pad_token_id=0).shape == (2, 15)


def test_autocast():
    model = tiny_btx()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens(), labels=tokens())
    assert (out.logits.float() - model(tokens()).logits).abs().median() < 8 * 2**-8
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model, out.loss).values())


# --- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_one_batch_is_learnt_by_heart(coefficient):
    torch.manual_seed(0)
    config = tiny_btx(router_aux_loss_coef=coefficient, initializer_range=0.02, pad_token_id=0).config
    model = BTXForCausalLM(config).train()
    text = tokens(1, 20)
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = model(text, labels=text).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 4  # log 61
    balancing = coefficient * config.num_hidden_layers * EXPERTS  # at most
    assert losses[-1] < 0.05 + balancing
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    told = model.eval().generate(text[:, :1], max_new_tokens=19, do_sample=False)
    torch.testing.assert_close(told, text)


def test_balancing_outlives_a_decoder_of_another_class():
    """`fully_shard(model.model)` changes the class of the decoder; transformers knows by class what to record."""
    model = tiny_btx(router_aux_loss_coef=1.0).train()
    expected = model(tokens(), labels=tokens()).loss
    model.model.__class__ = type("FSDPBTXModel", (BTXModel,), {})
    torch.testing.assert_close(model(tokens(), labels=tokens()).loss, expected)


def test_hidden_states_attentions_and_router_logits_have_gradients():
    model = tiny_btx(attn_implementation="eager", router_aux_loss_coef=0.0)
    out = model(tokens(), output_hidden_states=True, output_attentions=True, output_router_logits=True)
    recorded = [*out.hidden_states, *out.attentions, *out.router_logits]
    for value in recorded:
        value.retain_grad()
    out.logits.square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in recorded)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_an_adapter_through_a_frozen_model(checkpointing):
    """What PEFT asks for: the inputs require gradients, so that a checkpointed layer has something to keep."""
    model = tiny_btx().train()
    trained = model.model.layers[0].self_attn.q_proj.weight
    expected = gradients(model, model(tokens(), labels=tokens()).loss)["model.layers.0.self_attn.q_proj.weight"]
    model.zero_grad()
    model.requires_grad_(False)
    trained.requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].requires_grad))
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert all(seen)
    torch.testing.assert_close(trained.grad, expected, atol=1e-6, rtol=1e-5)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]
    model.disable_input_require_grads()


def test_checkpointing_asked_for_in_the_config():
    assert tiny_btx(gradient_checkpointing=True).model.layers[0].gradient_checkpointing
    assert not tiny_btx().model.layers[0].gradient_checkpointing


# --- what transformers reads off the class ---------------------------------------------------------------------


def test_the_class_says_what_a_mixture_in_transformers_says():
    flags = [name for name in dir(MixtralForCausalLM) if name.startswith("_supports_")]
    theirs = {name: getattr(MixtralForCausalLM, name) for name in flags}
    assert {name: getattr(BTXForCausalLM, name) for name in flags if not callable(theirs[name])} == {
        name: value for name, value in theirs.items() if not callable(value)
    }
    for cls in (BTXForCausalLM, BTXModel):
        assert cls.main_input_name == "input_ids"
        assert cls.base_model_prefix == "model"
        assert cls.supports_gradient_checkpointing
    assert BTXForCausalLM.can_generate()
    assert not BTXModel.can_generate()
    model = tiny_btx()
    assert model.base_model is model.model
    assert model.get_decoder() is model.model
