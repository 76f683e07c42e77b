"""Every routing against the slow reference, on logits and gradients, and what can be changed on a built model.

Legend: B batch, T tokens, N = B * T, H hidden, E experts, K experts per token.
"""

from __future__ import annotations

import math

import pytest
import torch
from btx_merge.modeling import BTXForCausalLM
from btx_merge.modeling.routing_btx import gumbel_temperature
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.models import (
    EXPERTS,
    IMPLEMENTATIONS,
    Routed,
    given_logits,
    gradients_of,
    gumbel_noise,
    read_gates,
    readable,
    slow_logits,
    tiny_btx,
    tokens,
    weights_of,
)

ROUTINGS = {
    "top 1": {"num_experts_per_tok": 1},
    "top 2": {},
    "top 3": {"num_experts_per_tok": 3},
    "top all": {"num_experts_per_tok": EXPERTS},
    "top 1 after softmax": {"router_pre_softmax": True, "num_experts_per_tok": 1},
    "top 3 after softmax, of chunks": {"router_pre_softmax": True, "num_experts_per_tok": 3, "num_chunks": 2},
    "switch": {"router_type": "switch"},
    "tight switch": {"router_type": "switch", "expert_capacity_factor": 0.6},
    "switch without capacity": {"router_type": "switch", "expert_capacity_factor": None},
    "soft": {"router_type": "soft"},
    "sample": {"router_type": "sample_top_1"},
}
DENSE = {
    "top 1": {"num_experts_per_tok": 1},
    "top 2": {},
    "top 2 after softmax, of chunks": {"router_pre_softmax": True, "num_chunks": 2},
    "switch": {"router_type": "switch", "expert_capacity_factor": None},
    "soft": {"router_type": "soft"},
    "sample": {"router_type": "sample_top_1"},
}


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three sequences of 8, 6 and 5 tokens, padded at the left, as [B, T] and their mask."""
    ids, mask = tokens(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[1, :2] = 0
    mask[2, :3] = 0
    return ids.masked_fill(mask == 0, 0), mask


def compare(model: BTXForCausalLM, *, temperature: float = 1.0, **call) -> dict[str, torch.Tensor]:
    """Logits and gradients of a call against the slow reference, which gets its K and active experts.

    float32 against float64: 1e-5 of the largest value, about ten roundings of a long sum. Returns the gradients.
    """
    ids, mask = padded_batch()
    weights, config = weights_of(model), model.config
    active = call.get("active_experts")
    if active and isinstance(active[0], str):
        active = [config.expert_names.index(name) for name in active]
    torch.manual_seed(3)
    routed = Routed(
        training=model.training,
        mask=mask,
        per_token=call.get("num_experts_per_tok"),
        active=active,
        temperature=temperature,
        noise=gumbel_noise(config, ids.numel(), active),
    )
    expected = slow_logits(config, weights, ids, routed)
    torch.manual_seed(3)
    ours = model(ids, attention_mask=mask, use_cache=False, **call).logits * mask[..., None]
    assert expected.abs().max() > 1
    torch.testing.assert_close(ours.double(), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)

    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (ours * direction).sum().backward()
    (expected * direction.double()).sum().backward()
    for name, ours in gradients_of(model).items():
        weight = weights[name]
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        atol = 1e-5 * max(1.0, weight.grad.abs().max().item())
        torch.testing.assert_close(ours.double(), weight.grad, atol=atol, rtol=0, msg=name)
    return {name: weight.grad for name, weight in weights.items()}


def gate_gradient(gradients: dict[str, torch.Tensor], layer: int = 1) -> torch.Tensor:
    return gradients[f"model.layers.{layer}.mlp.gate.weight"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_logits_and_gradients(routing, training):
    gradients = compare(tiny_btx(**ROUTINGS[routing]).train(training))
    constant = routing == "top 1" or (routing == "sample" and not training)  # a weight of exactly 1
    assert (gate_gradient(gradients).abs().max() > 1e-3) != constant


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:2])  # the third is the default, as tested above
@pytest.mark.parametrize("routing", ["tight switch", "soft", "sample"])
def test_experts_implementations(routing, implementation, training):
    model = tiny_btx(**ROUTINGS[routing]).train(training)
    model.set_experts_implementation(implementation)
    compare(model)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_one_expert(routing, training):
    changes = {**ROUTINGS[routing], "num_local_experts": 1, "num_experts_per_tok": 1}
    compare(tiny_btx(**changes).train(training))


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_sampling_at_another_temperature(temperature):
    model = tiny_btx(router_type="sample_top_1").train()
    model.set_router_temperature(temperature)
    compare(model, temperature=temperature)
    model.eval()
    compare(model)  # no sampling, no temperature


def test_the_temperature_is_no_part_of_what_is_saved(tmp_path):
    model = tiny_btx(router_type="sample_top_1")
    before = model.config.to_dict(), list(model.state_dict())
    model.model.set_router_temperature(0.5)
    assert (model.config.to_dict(), list(model.state_dict())) == before
    model.save_pretrained(tmp_path)
    compare(BTXForCausalLM.from_pretrained(tmp_path).train())  # at temperature 1


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_samples_are_distributed_as_their_softmax_says(temperature):
    """By the Gumbel-max trick, at any temperature. 20,000 tokens; five standard errors are allowed."""
    model = readable(tiny_btx(router_type="sample_top_1", max_position_embeddings=2048)).train()
    model.set_router_temperature(temperature)
    count, logits = 20_000, torch.tensor([1.0, 0.0, -1.0, 0.5])
    torch.manual_seed(7)
    with given_logits(model, [logits.expand(count, -1)] * 2):
        soft, sampled = read_gates(model, tokens(20, 1000))
    probabilities = logits.double().softmax(0)
    torch.testing.assert_close(soft, probabilities.expand(count, -1), atol=1e-4, rtol=0)
    assert ((sampled.abs() > 1e-6).sum(1) == 1).all()
    frequency = (sampled.abs() > 1e-6).double().mean(0)
    error = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((frequency - probabilities).abs() < 5 * error).all()
    uniform = torch.rand(count, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    values = ((logits - torch.log(-torch.log(uniform))) / temperature).softmax(1).amax(1)  # kept, not set to 1
    kept = sampled.amax(1)
    assert (kept.mean() - values.mean()).abs() < 5 * values.std() * math.sqrt(2 / count)
    assert kept.std().item() == pytest.approx(values.std().item(), rel=0.05)


def test_samples_differ_between_calls_and_repeat_with_the_seed():
    model = tiny_btx(router_type="sample_top_1").train()
    outputs = []
    for seed in (1, None, 1):
        if seed is not None:
            torch.manual_seed(seed)
        outputs.append(model(tokens()).logits)
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_gumbel_temperature():
    """The floor of 0.5 is reached at step ln(2) / rate: 6,931 by default."""
    assert gumbel_temperature(0) == 1
    assert gumbel_temperature(3000) == pytest.approx(math.exp(-0.3))
    assert gumbel_temperature(6931) > 0.5
    assert gumbel_temperature(6932) == gumbel_temperature(10**9) == 0.5
    assert gumbel_temperature(10, rate=0.2, minimum=0.1) == pytest.approx(math.exp(-2))
    assert gumbel_temperature(20, rate=0.2, minimum=0.1) == 0.1


# --- Switch's capacity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "real", "active", "places"),
    [
        (1.5, 8, None, 3),
        (1.0, 8, None, 2),
        (1.0, 7, None, 2),  # 1.75, rounded up
        (1.0, 5, None, 2),
        (0.01, 8, None, 1),
        (1.5, 8, [0, 2], 6),
        (1.5, 6, None, 3),
        (4.0, 8, None, 8),
        (None, 8, None, 8),
    ],
)
def test_tokens_beyond_the_capacity_pass_by(factor, real, active, places):
    """All want expert 2: the first real ones get in. In evaluation all do."""
    model = readable(tiny_btx(router_type="switch", expert_capacity_factor=factor)).train()
    mask = torch.ones(3, 5, dtype=torch.long)
    for row, padding in enumerate([5, 3, 2] if real == 5 else [2, 4, 3] if real == 6 else [4, 3, 8 - real]):
        mask[row, :padding] = 0
    assert mask.sum() == real
    logits = torch.tensor([0.1, 0.0, 1.0, -1.0]).expand(mask.numel(), -1)
    probability = logits[0, active or slice(None)].double().softmax(0).max()
    numbers = mask.flatten().nonzero().flatten()
    for training in (True, False):
        model.train(training)
        with given_logits(model, [logits] * 2):
            for gates in read_gates(model, tokens(3, 5), attention_mask=mask, active_experts=active):
                expected = torch.zeros(mask.numel(), EXPERTS, dtype=torch.float64)
                expected[numbers[: places if training else None], 2] = probability
                torch.testing.assert_close(gates[numbers], expected[numbers], atol=1e-5, rtol=0)


def test_the_capacity_is_not_rounded_up_for_a_float32():
    """1.2 * 100 / 4 is 30, and 30.000002 in single precision."""
    model = readable(tiny_btx(router_type="switch", expert_capacity_factor=1.2, max_position_embeddings=128)).train()
    with given_logits(model, [torch.eye(EXPERTS)[2].expand(100, -1)] * 2):
        for gates in read_gates(model, tokens(1, 100)):
            assert gates[:, 2].count_nonzero() == 30


def test_the_capacity_is_each_experts_own():
    """Two experts wanted by turns: each has its places, and one that is full does not close the other."""
    model = readable(tiny_btx(router_type="switch", expert_capacity_factor=1.0)).train()
    wanted = [1, 1, 1, 3, 1, 3, 3, 3]  # two places each
    logits = 9.0 * torch.eye(EXPERTS)[wanted]
    with given_logits(model, [logits] * 2):
        for gates in read_gates(model, tokens(2, 4)):
            assert (gates > 0.5).nonzero().tolist() == [[0, 1], [1, 1], [3, 3], [5, 3]]
            assert (gates.abs() < 1e-6).sum() == 8 * EXPERTS - 4


# --- the router's dense gradient -------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", list(DENSE))
def test_dense_gradient_of_the_router(routing):
    """Of all parameters: the routers' is that of the mixture of all, the experts' and what lies below as ever."""
    sparse = compare(tiny_btx(**DENSE[routing]).train())
    dense = compare(tiny_btx(**DENSE[routing], router_grad="dense").train())
    changed = (gate_gradient(sparse) - gate_gradient(dense)).abs().max() > 1e-2
    assert changed == (routing != "soft")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:2])
def test_dense_gradient_with_every_implementation(implementation):
    model = tiny_btx(router_grad="dense").train()
    model.set_experts_implementation(implementation)
    compare(model)


def test_dense_gradient_with_active_experts():
    compare(tiny_btx(router_grad="dense").train(), active_experts=[3, 0, 1])
    compare(tiny_btx(router_grad="dense", router_type="sample_top_1").train(), active_experts=[3, 0, 1])


@pytest.mark.parametrize("routing", list(DENSE))
def test_dense_gradient_changes_no_value(routing):
    """In evaluation the same operations, to the last bit; in training up to the order of a sum."""
    sparse, dense = tiny_btx(**DENSE[routing]), tiny_btx(**DENSE[routing], router_grad="dense")
    ids, mask = padded_batch()
    with torch.no_grad():
        assert torch.equal(sparse(ids, attention_mask=mask).logits, dense(ids, attention_mask=mask).logits)
        options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        assert torch.equal(sparse.generate(ids, **options), dense.generate(ids, **options))
    outputs = []
    for model in (sparse.train(), dense.train()):
        torch.manual_seed(3)
        outputs.append(model(ids, attention_mask=mask).logits * mask[..., None])
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=0)


# --- K of a call -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_token", range(1, EXPERTS + 1))
@pytest.mark.parametrize("before", [False, True])
def test_experts_per_token_of_one_call(per_token, before):
    model = tiny_btx(router_pre_softmax=before)
    compare(model, num_experts_per_tok=per_token)
    assert model.config.num_experts_per_tok == 2
    compare(model)
    same = tiny_btx(router_pre_softmax=before, num_experts_per_tok=per_token)
    with torch.no_grad():
        for ours, other in [(model, same), (model.model, same.model)]:
            expected = other(tokens(), output_router_logits=True)
            called = ours(tokens(), output_router_logits=True, num_experts_per_tok=per_token)
            torch.testing.assert_close(called[0], expected[0], atol=0, rtol=0)
            torch.testing.assert_close(called.get("aux_loss", 0), expected.get("aux_loss", 0), atol=0, rtol=0)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    generated = model.generate(tokens(2, 5), num_experts_per_tok=per_token, **options)
    torch.testing.assert_close(generated, same.generate(tokens(2, 5), **options))
    assert model.config.num_experts_per_tok == model.generation_config.to_dict().get("num_experts_per_tok", 2) == 2


@pytest.mark.parametrize("per_token", [0, -1, EXPERTS + 1, 1.5, "2", True])
def test_a_bad_number_of_experts_per_token_of_one_call(per_token):
    model = tiny_btx()
    with pytest.raises(ValueError, match=r"num_experts_per_tok is .*expected an integer in \[1, 4\]"):
        model(tokens(), num_experts_per_tok=per_token)
    compare(model)


@pytest.mark.parametrize("router_type", ["switch", "soft", "sample_top_1"])
def test_other_routings_ignore_the_experts_per_token(router_type):
    model = tiny_btx(router_type=router_type, num_experts_per_tok=1)
    with torch.no_grad():
        expected = model(tokens()).logits
        model.config.num_experts_per_tok = 3
        assert torch.equal(model(tokens()).logits, expected)
        assert torch.equal(model(tokens(), num_experts_per_tok=2).logits, expected)


# --- split experts, softmax before the selection ---------------------------------------------------------------


@pytest.mark.parametrize(("sources", "chunks"), [(4, 1), (2, 2), (1, 4), (3, 2)])
def test_rescaled_softmax_with_a_zero_router_is_the_dense_layer(sources, chunks):
    """He et al. 2410.07524: equal chunks under a router that does not know anything yet, for every K."""
    width = 12
    model = tiny_btx(
        router_pre_softmax=True, num_chunks=chunks, num_local_experts=sources * chunks, intermediate_size=width
    )
    torch.manual_seed(5)
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "dtype")}
    llama = LlamaForCausalLM(LlamaConfig(**{**config, "intermediate_size": chunks * width})).eval()
    missing, _ = llama.load_state_dict(model.state_dict(), strict=False)
    assert all("mlp" in name for name in missing)
    with torch.no_grad():
        for layer, dense in zip(model.model.layers, llama.model.layers, strict=True):
            layer.mlp.gate.weight.zero_()
            gate_up, down = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
            gate_up[:], down[:] = gate_up[:1].clone(), down[:1].clone()
            gate, up = gate_up[0].chunk(2)
            dense.mlp.gate_proj.weight[:] = gate.repeat(chunks, 1)
            dense.mlp.up_proj.weight[:] = up.repeat(chunks, 1)
            dense.mlp.down_proj.weight[:] = down[0].repeat(1, chunks)
        expected = llama(tokens()).logits
        for per_token in range(1, sources * chunks + 1):
            ours = model(tokens(), num_experts_per_tok=per_token).logits
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


# --- gradient checkpointing ------------------------------------------------------------------------------------

CHECKPOINTED = {
    **ROUTINGS,
    **{f"dense {name}": {**changes, "router_grad": "dense"} for name, changes in DENSE.items()},
    "with a selection bias": {"router_selection_bias": True},
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("routing", list(CHECKPOINTED))
def test_gradient_checkpointing_gives_the_same_gradients(routing):
    """The recomputation draws the same samples, and what is recorded has its gradient."""
    ids, mask = padded_batch()
    labels = ids.masked_fill(mask == 0, -100)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_btx(**CHECKPOINTED[routing], router_aux_loss_coef=1.0, router_z_loss_coef=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(6)
        model(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-6, rtol=1e-5, msg=name)


# --- what is shown, and other precisions -----------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("routing", ["top 2", "switch", "soft", "sample"])
def test_router_logits_are_raw(routing, training):
    """W x of every expert, whatever is made of it: no mask, noise, temperature or bias."""
    model = tiny_btx(**ROUTINGS[routing]).train(training)
    if routing == "sample":
        model.set_router_temperature(0.5)
    inputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    out = model(tokens(), output_router_logits=True, active_experts=[1, 2])
    for layer, hidden, logits in zip(model.model.layers, inputs, out.router_logits, strict=True):
        assert logits.shape == (22, EXPERTS)
        torch.testing.assert_close(logits, hidden @ layer.mlp.gate.weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("routing", [*ROUTINGS, "dense"])
def test_bf16(routing):
    """Runs, trains, and is near to float32: the median error is a few roundings of 2**-8 on logits of about 5."""
    model = tiny_btx(**(ROUTINGS.get(routing) or {"router_grad": "dense"}))
    ids, mask = padded_batch()
    with torch.no_grad():
        exact = model(ids, attention_mask=mask).logits
        model.to(torch.bfloat16)
        ours = model(ids, attention_mask=mask).logits
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact)[mask == 1].abs().median() < 8 * 2**-8
    out = model.train()(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    assert out.aux_loss.dtype == torch.float32
    out.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_temperatures_that_are_none(temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}; expected a number above 0"):
        tiny_btx(router_type="sample_top_1").set_router_temperature(temperature)
