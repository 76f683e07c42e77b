"""Routers in training: the selection bias that balances without a loss (2408.15664), and what Trainer calls back.

Legend: E experts, K experts per token, N tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from btx_merge.modeling import BTXForCausalLM
from transformers import Trainer, TrainerCallback, TrainingArguments

from btx_merge.training import GumbelAnnealing, RouterBiasUpdate
from tests.support.models import (
    EXPERTS,
    Routed,
    given_logits,
    gradients_of,
    read_gates,
    readable,
    slow_gates,
    slow_logits,
    tiny_btx,
    tokens,
    weights_of,
)

BIAS = "model.layers.{}.mlp.routing.e_score_correction_bias"
CHOSEN = 5 * torch.eye(EXPERTS)
"""CHOSEN[e] are router logits of a token that goes to expert e."""


def biased(**changes: Any) -> BTXForCausalLM:
    return tiny_btx(router_selection_bias=True, **changes)


def bias_of(model: BTXForCausalLM, layer: int = 0) -> torch.Tensor:
    return model.get_buffer(BIAS.format(layer))


def send(model: BTXForCausalLM, experts: list[int], mask: torch.Tensor | None = None) -> None:
    """A training forward with one token for each of these experts."""
    with given_logits(model, [CHOSEN[experts]] * model.config.num_hidden_layers):
        model(tokens(1, len(experts)), attention_mask=mask)


# --- the selection bias ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"router_pre_softmax": True},
        {"router_grad": "dense"},
        {"router_type": "switch", "expert_capacity_factor": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [False, True])
def test_the_bias_selects_but_does_not_weigh(changes, training):
    """Against the slow reference; and it is added to SoftMax(W x), not to the logits."""
    model = readable(biased(**changes)).train(training)
    bias = [torch.tensor([0.3, -0.2, 0.1, -0.4]), torch.tensor([-0.25, 0.15, 0.2, 0.0])]
    generator = torch.Generator().manual_seed(2)
    layers = [torch.randn(200, EXPERTS, generator=generator) for _ in bias]
    for layer, value in enumerate(bias):
        bias_of(model, layer).copy_(value)
    with given_logits(model, layers):
        ours = read_gates(model, tokens(4, 50))
    for layer, logits in enumerate(layers):
        slow = [
            [
                torch.stack(slow_gates(model.config, row.double(), layer, n, Routed(training, bias=used)))
                for n, row in enumerate(logits)
            ]
            for used in (bias, ())
        ]
        expected, unbiased = (torch.stack(rows) for rows in slow)
        torch.testing.assert_close(ours[layer], expected, atol=1e-4, rtol=0)
        changed = ((expected > 0) != (unbiased > 0)).any(1)
        assert 20 < changed.sum() < 180
        assert torch.equal(expected[~changed], unbiased[~changed])


@pytest.mark.parametrize("active", [None, [0, 3]])
def test_logits_and_gradients_with_a_bias(active):
    """float32 against float64: 1e-5 of the largest value."""
    model = biased(num_experts_per_tok=1 if active else 2, router_pre_softmax=True).train()
    bias = [torch.tensor([-0.3, 0.1, 0.2, 0.25]), torch.tensor([0.1, 0.2, -0.5, -0.1])]
    for layer, value in enumerate(bias):
        bias_of(model, layer).copy_(value)
    weights = weights_of(model)
    expected = slow_logits(model.config, weights, tokens(), Routed(True, bias=bias, active=active))
    ours = model(tokens(), active_experts=active).logits
    torch.testing.assert_close(ours.double(), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    expected.square().mean().backward()
    ours.square().mean().backward()
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient.double(), weights[name].grad, atol=1e-5, rtol=1e-4, msg=name)


def test_the_bias_is_a_buffer_only_of_models_that_have_one(tmp_path):
    model = biased()
    assert set(model.state_dict()) - set(tiny_btx().state_dict()) == {BIAS.format(layer) for layer in range(2)}
    assert BIAS.format(0) not in dict(model.named_parameters())
    assert bias_of(model).dtype == torch.float32
    assert torch.equal(bias_of(model), torch.zeros(EXPERTS))
    bias_of(model, 1).copy_(torch.tensor([0.001, -0.002, 0.003, 0.0]))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = BTXForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.dtype == dtype
        assert bias_of(loaded, 1).dtype == torch.float32  # bf16 would lose steps of 0.001 from 0.25 on
        torch.testing.assert_close(bias_of(loaded, 1), bias_of(model, 1).float(), atol=0, rtol=0)


def test_the_bias_of_a_bf16_model_is_trained_and_saved_in_float32(tmp_path):
    biased().save_pretrained(tmp_path / "before")
    model = BTXForCausalLM.from_pretrained(tmp_path / "before", dtype=torch.bfloat16)
    bias_of(model).fill_(0.25)
    model.train()
    send(model, [0, 0, 1, 2])
    model.update_router_bias(1e-4)
    assert bias_of(model).unique().numel() > 1
    model.save_pretrained(tmp_path / "after")
    loaded = BTXForCausalLM.from_pretrained(tmp_path / "after", dtype=torch.bfloat16)
    assert torch.equal(bias_of(loaded), bias_of(model))


def test_a_bias_against_a_router_that_is_certain():
    """The chosen ones' weights are those of their logits, also where SoftMax(W x) of them all is 0 in float32."""
    logits = torch.tensor([300.0, 1.0, 0.0, 2.0], requires_grad=True)
    model = readable(biased()).train()
    for layer in range(2):
        bias_of(model, layer).copy_(torch.tensor([-3.0, 1.0, 0.0, 0.5]))
    with given_logits(model, [logits.expand(4, -1)] * 2):
        for gates in read_gates(model, tokens(1, 4)):
            one, other = math.exp(1) / (math.exp(1) + math.exp(2)), math.exp(2) / (math.exp(1) + math.exp(2))
            expected = torch.tensor([0, one, 0, other], dtype=torch.float64).expand(4, -1)
            torch.testing.assert_close(gates, expected, atol=1e-5, rtol=0)
        model(tokens(1, 4), labels=tokens(1, 4)).loss.backward()
    assert torch.isfinite(logits.grad).all()


def test_a_new_model_of_a_biased_config_starts_without_preferences(tmp_path):
    """Also one loaded from a checkpoint that was saved without a bias."""
    tiny_btx().save_pretrained(tmp_path)
    loaded = BTXForCausalLM.from_pretrained(tmp_path, router_selection_bias=True)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, tiny_btx()(tokens()).logits)
    assert all(torch.equal(bias_of(loaded, layer), torch.zeros(EXPERTS)) for layer in range(2))
    loaded.train().update_router_bias()
    assert torch.equal(bias_of(loaded), torch.zeros(EXPERTS))  # nothing was counted yet


def test_update_rule():
    """speed * sign(mean load - load), of the tokens since the last update, per layer."""
    model = biased(num_experts_per_tok=1).train()
    send(model, [0, 0, 0, 1])
    send(model, [0, 1, 1, 2])  # 4, 3, 1, 0: the mean is 2
    assert model.update_router_bias(0.5) is None
    assert torch.equal(bias_of(model), torch.tensor([-0.5, -0.5, 0.5, 0.5]))
    assert torch.equal(bias_of(model, 1), torch.tensor([-0.5, -0.5, 0.5, 0.5]))
    bias_of(model).zero_()
    bias_of(model, 1).zero_()
    send(model, [3, 3, 3, 3, 0, 0, 1, 2])  # 2, 1, 1, 4, and what was counted before is forgotten
    model.update_router_bias(0.25)
    assert torch.equal(bias_of(model), torch.tensor([0.0, 0.25, 0.25, -0.25]))  # 2 is the mean
    model.update_router_bias(0.25)  # nothing was seen
    assert torch.equal(bias_of(model), torch.tensor([0.0, 0.25, 0.25, -0.25]))
    send(model, [0])
    model.model.update_router_bias()  # the decoder's own method, at the default speed
    torch.testing.assert_close(bias_of(model), torch.tensor([-0.001, 0.251, 0.251, -0.249]))


def test_layers_have_loads_of_their_own_and_k_choices_count():
    model = biased(num_experts_per_tok=2).train()
    layers = [torch.tensor([[3.0, 2, 1, 0]]).repeat(4, 1), torch.tensor([[0.0, 1, 2, 3]]).repeat(4, 1)]
    with given_logits(model, layers):
        model(tokens(1, 4))
    model.update_router_bias(1.0)
    assert bias_of(model, 0).tolist() == [-1, -1, 1, 1]
    assert bias_of(model, 1).tolist() == [1, 1, -1, -1]


def test_only_real_tokens_of_training_forwards_are_counted():
    model = biased(num_experts_per_tok=1).train()
    send(model, [0, 0, 0, 1, 1], torch.tensor([[0, 0, 1, 1, 1]]))  # 1, 2, 0, 0
    model.eval()
    send(model, [0] * 10)
    with torch.no_grad():
        model.generate(tokens(), max_new_tokens=2)
    model.train()
    model.update_router_bias(0.125)
    assert bias_of(model).tolist() == [-0.125, -0.125, 0.125, 0.125]  # the mean is 0.75
    send(model, [0, 0, 0, 1, 1, 2, 3], torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))  # 0, 2, 1, 1
    model.update_router_bias(0.125)
    assert bias_of(model).tolist() == [0, -0.25, 0.125, 0.125]


def test_experts_that_are_switched_off_do_not_drift():
    """They get no tokens, and yet are not pushed up: the mean is that of the others."""
    model = biased(num_experts_per_tok=1).train()
    model.set_active_experts([0, 1, 3])
    send(model, [0, 0, 0, 0, 1, 3])  # the mean of three is 2
    model.update_router_bias(0.25)
    assert bias_of(model).tolist() == [-0.25, 0.25, 0, 0.25]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")
def test_a_recomputed_forward_is_not_counted_twice():
    """3 tokens for expert 0 with a backward pass, 5 for expert 1 without: 3 and 5, not 6 and 5."""
    model = biased(num_experts_per_tok=1, num_local_experts=2).train()
    model.gradient_checkpointing_enable()
    chosen = 5 * torch.eye(2)
    with given_logits(model, [chosen[[0, 0, 0]]] * 2):
        model(tokens(1, 3), use_cache=False).logits.sum().backward()
    with given_logits(model, [chosen[[1] * 5]] * 2):
        model(tokens(1, 5), use_cache=False)
    model.update_router_bias(1.0)
    assert bias_of(model).tolist() == [1, -1]


def test_the_bias_moves_the_load_towards_balance():
    """A router that prefers expert 0: its share of the choices falls towards 1 / E."""
    model = biased(num_experts_per_tok=1).train()
    logits = torch.randn(500, EXPERTS, generator=torch.Generator().manual_seed(3)) + torch.tensor([1.5, 0, 0, -1])
    ids, uneven = tokens(10, 50), []
    with given_logits(model, [logits] * 2), torch.no_grad():
        for _ in range(60):
            chosen = (logits.softmax(1) + bias_of(model)).argmax(1)
            share = torch.bincount(chosen, minlength=EXPERTS) / len(logits)
            uneven.append((share - 1 / EXPERTS).abs().max().item())
            model(ids)
            model.update_router_bias(0.01)
    assert uneven[0] > 0.3
    assert uneven[-1] < 0.05
    assert torch.equal(bias_of(model, 0), bias_of(model, 1))


def test_a_model_without_a_bias_has_nothing_to_update():
    with pytest.raises(ValueError, match="router_selection_bias is False; load the model with"):
        tiny_btx().train().update_router_bias()


# --- Trainer ---------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Writes down the temperature under which each training forward ran, and how often the bias was moved."""

    def __init__(self, model: BTXForCausalLM):
        self.temperature, self.forwards, self.updates = None, [], []
        self.forward, self.set, self.update = model.forward, model.set_router_temperature, model.update_router_bias
        model.set_router_temperature = self.set_temperature
        model.update_router_bias = self.update_bias
        model.register_forward_pre_hook(lambda model, args: self.before(model))

    def before(self, model: BTXForCausalLM) -> None:
        if model.training:
            self.forwards.append(self.temperature)

    def set_temperature(self, value: float) -> None:
        self.temperature = value
        self.set(value)

    def update_bias(self, *args: Any, **kwargs: Any) -> None:
        self.updates.append((len(self.forwards), args, kwargs))
        self.update(*args, **kwargs)


def trainer(model: BTXForCausalLM, folder: Path, callback: TrainerCallback, **arguments: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in tokens(16, 7)]
    values = {
        "max_steps": 6,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 1,
    }
    settings = TrainingArguments(str(folder), **{**values, **arguments})
    return Trainer(model=model, args=settings, train_dataset=rows, eval_dataset=rows, callbacks=[callback])


@pytest.mark.parametrize(
    ("callback", "rate"),
    [
        (lambda: GumbelAnnealing(rate=0.05), 0.05),
        (lambda: GumbelAnnealing(), 1e-4),
        (lambda: GumbelAnnealing(rate=3.0, relative=True), 3.0 / 6),
        (lambda: GumbelAnnealing(relative=True), 2.0 / 6),
    ],
)
def test_the_temperature_falls_with_the_steps_and_goes_on_after_a_resume(tmp_path, callback, rate):
    """Two micro-batches per step, so two forwards at each temperature, evaluated in between."""
    expected = [max(0.5, math.exp(-rate * step)) for step in range(6) for _ in range(2)]
    options = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    model = tiny_btx(router_type="sample_top_1")
    watch = Watch(model)
    trainer(model, tmp_path, callback(), **options).train()
    assert watch.forwards == pytest.approx(expected)

    resumed = tiny_btx(router_type="sample_top_1")
    watch = Watch(resumed)
    trainer(resumed, tmp_path, callback(), **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert watch.forwards == pytest.approx(expected[8:])
    for name, value in model.state_dict().items():  # the random state was restored too
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("callback", "speed"), [(RouterBiasUpdate, 1e-3), (lambda: RouterBiasUpdate(0.125), 0.125)])
def test_the_bias_is_moved_after_each_optimizer_step(tmp_path, callback, speed):
    model = biased()
    watch = Watch(model)
    options = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer(model, tmp_path, callback(), **options).train()
    assert [forwards for forwards, _, _ in watch.updates] == [2, 4, 6, 8, 10, 12]
    for layer in range(2):
        steps = bias_of(model, layer) / speed
        assert steps.abs().max() >= 1
        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    loaded = BTXForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert torch.equal(bias_of(loaded), bias_of(model))


def test_trainer_balances_over_the_accumulated_batch(tmp_path):
    """One step of two micro-batches, in either scope: the values seen are those of the contract."""
    seen = {}
    for scope in ("micro_batch", "global_batch"):
        model = tiny_btx(router_aux_loss_scope=scope, router_aux_loss_coef=0.5, output_router_logits=True)
        outputs: list[Any] = []
        model.register_forward_hook(lambda model, args, out, outputs=outputs: outputs.append(out))
        callback = TrainerCallback()
        trainer(model, tmp_path / scope, callback, gradient_accumulation_steps=2, max_steps=2).train()
        seen[scope] = torch.stack([out.aux_loss.detach() for out in outputs])
    micro, joint = seen["micro_batch"], seen["global_batch"]
    torch.testing.assert_close(micro[0], joint[0], atol=1e-6, rtol=0)
    assert (micro[1] - joint[1]).abs() > 1e-4
    torch.testing.assert_close(micro[2], joint[2], atol=1e-2, rtol=0)  # after one nearly equal step
