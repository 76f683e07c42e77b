"""The losses that train the routers, against slow references made of loops: balancing (section 3.2) and z-loss.

Legend: B batch, T tokens, N = B * T, E experts, K experts per token, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from btx_merge.modeling import BTXForCausalLM, BTXForSequenceClassification, BTXForTokenClassification

from tests.support.models import (
    EXPERTS,
    Routed,
    cross_entropy,
    given_logits,
    gumbel_noise,
    slow_balancing_loss,
    slow_z_loss,
    tiny_btx,
    tokens,
)

ROUTINGS = {
    "top 1": {"num_experts_per_tok": 1},
    "top 2": {},
    "top 3": {"num_experts_per_tok": 3},
    "top 4": {"num_experts_per_tok": 4},
    "top 2 after softmax": {"router_pre_softmax": True, "num_chunks": 2},
    "switch": {"router_type": "switch", "expert_capacity_factor": 0.5},
    "soft": {"router_type": "soft"},
    "sample": {"router_type": "sample_top_1"},
    "dense top 2": {"router_grad": "dense"},
    "dense top 2 after softmax": {"router_grad": "dense", "router_pre_softmax": True},
    "dense switch": {"router_grad": "dense", "router_type": "switch"},
    "dense sample": {"router_grad": "dense", "router_type": "sample_top_1"},
}
MASKS = {
    "no mask": None,
    "all ones": torch.ones(2, 5, dtype=torch.long),
    "some": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]),
    "one token": torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]),
}


def random_logits(count: int, seed: int = 0, layers: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, EXPERTS, generator=generator, requires_grad=True) for _ in range(layers)]


def in_float64(layers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [logits.detach().double().requires_grad_() for logits in layers]


def aux_loss(model: BTXForCausalLM, ids: torch.Tensor, layers: Sequence[torch.Tensor], **call) -> torch.Tensor:
    with given_logits(model, layers):
        return model(ids, output_router_logits=True, use_cache=False, **call).aux_loss


def assert_same_gradients(layers: Sequence[torch.Tensor], slow: Sequence[torch.Tensor], mask: torch.Tensor | None):
    for mine, reference in zip(layers, slow, strict=True):
        torch.testing.assert_close(mine.grad.double(), reference.grad, atol=1e-6, rtol=1e-5)
        if mask is not None:
            assert not mine.grad[mask.flatten() == 0].any()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", list(MASKS))
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_value_and_gradients(routing, masked, training):
    model, mask = tiny_btx(**ROUTINGS[routing]).train(training), MASKS[masked]
    layers = random_logits(10)
    slow = in_float64(layers)
    torch.manual_seed(4)
    routed = Routed(training=training, mask=mask, noise=gumbel_noise(model.config, 10))
    expected = slow_balancing_loss(model.config, slow, routed)
    torch.manual_seed(4)
    ours = aux_loss(model, tokens(2, 5), layers, attention_mask=mask)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, atol=0, rtol=2e-6)  # a few roundings of float32
    ours.backward()
    expected.backward()
    assert_same_gradients(layers, slow, mask)
    assert slow[1].grad.abs().max() > 1e-3


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_of_a_call_with_active_experts_and_another_k(routing, training):
    """E, u and p are those of the active experts; K is the call's, at most their number."""
    model, mask = tiny_btx(**ROUTINGS[routing]).train(training), MASKS["some"]
    for active, per_token in [([3, 1], None), ([0, 1, 3], 1), (None, 3), ([2, 0], 4), ([2], None)]:
        layers = random_logits(10, seed=1)
        slow = in_float64(layers)
        torch.manual_seed(4)
        routed = Routed(training, mask, per_token, active, noise=gumbel_noise(model.config, 10, active))
        expected = slow_balancing_loss(model.config, slow, routed)
        torch.manual_seed(4)
        ours = aux_loss(
            model,
            tokens(2, 5),
            layers,
            attention_mask=mask,
            active_experts=active,
            num_experts_per_tok=per_token,
        )
        torch.testing.assert_close(ours.double(), expected, atol=0, rtol=2e-6)
        ours.backward()
        if expected.requires_grad:
            expected.backward()
        for mine, reference in zip(layers, slow, strict=True):
            torch.testing.assert_close(mine.grad.double(), reference.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("changes", [*({"num_experts_per_tok": k} for k in (1, 2, 3, 4)), {"router_type": "soft"}])
def test_1_per_layer_at_balance(changes):
    """Every expert is first, second, ... equally often. For each K, not K itself as with Mixtral's loss.

    So the loss in training is alpha * L higher there: the paper's convention.
    """
    turns = torch.tensor([[3.0, 1.0, -0.5, -2.0]]).repeat(4, 1)
    balanced = torch.stack([row.roll(shift) for shift, row in enumerate(turns)])
    model = tiny_btx(**changes)
    assert aux_loss(model, tokens(2, 2), [balanced, balanced.flip(0)]).item() == pytest.approx(2, abs=1e-6)
    one_layer = tiny_btx(**changes, num_hidden_layers=1)
    assert aux_loss(one_layer, tokens(2, 2), [balanced]).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("routing", ["top 1", "top 2", "switch", "soft", "sample"])
def test_at_collapse(routing):
    """Every token to expert 2 with certainty: E per layer. With K equal shares of it, still above balance."""
    collapsed = torch.zeros(6, EXPERTS)
    collapsed[:, 2] = 50
    model = tiny_btx(**ROUTINGS[routing]).train()
    ours = aux_loss(model, tokens(2, 3), [collapsed, collapsed])
    assert ours.item() == pytest.approx(2 * EXPERTS, abs=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    """Logits, loss and balancing loss of a padded batch are those of its sequences alone."""
    model = tiny_btx(pad_token_id=0).train()
    long, short = tokens(1, 11), tokens(1, 7)
    padding = torch.zeros(1, 4, dtype=torch.long)
    padded, real = {
        "left": (torch.cat([padding, short], 1), slice(4, 11)),
        "right": (torch.cat([short, padding], 1), slice(0, 7)),
    }[side]
    ids, mask = torch.cat([long, padded]), torch.ones(2, 11, dtype=torch.long)
    mask[1] = 0
    mask[1, real] = 1
    out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), output_router_logits=True)
    alone = [model(sequence, output_router_logits=True) for sequence in (long, short)]
    torch.testing.assert_close(out.logits[1, real], alone[1].logits[0], atol=1e-5, rtol=0)
    layers = [torch.cat(pair) for pair in zip(*(one.router_logits for one in alone), strict=True)]
    expected = slow_balancing_loss(model.config, in_float64(layers))
    torch.testing.assert_close(out.aux_loss.double(), expected.detach(), atol=0, rtol=1e-5)
    assert [tuple(layer.shape) for layer in out.router_logits] == [(22, EXPERTS)] * 2
    unmasked = model(ids, output_router_logits=True)
    assert (unmasked.aux_loss - out.aux_loss).abs() > 1e-3  # it would have counted


def test_the_mask_of_a_continued_sequence_is_the_last_tokens_part():
    """With a cache the mask covers what came before too; the router has seen the new tokens only."""
    model = tiny_btx(pad_token_id=0)
    ids = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens(1, 7)], 1), tokens(1, 11)])
    mask = (ids != 0).long()
    with torch.no_grad():
        cache = model(ids[:, :2], attention_mask=mask[:, :2], use_cache=True).past_key_values
        out = model(ids[:, 2:], attention_mask=mask, past_key_values=cache, output_router_logits=True)
    expected = slow_balancing_loss(model.config, in_float64(out.router_logits), Routed(mask=mask[:, 2:]))
    torch.testing.assert_close(out.aux_loss.double(), expected.detach(), atol=0, rtol=1e-5)


# --- what joins the loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("requested", [None, False, True])
@pytest.mark.parametrize("in_config", [False, True])
def test_balancing_joins_the_loss_in_training_whatever_is_put_out(requested, in_config):
    model = tiny_btx(router_aux_loss_coef=0.5, output_router_logits=in_config)
    ids = tokens()
    evaluated = model(ids, labels=ids, output_router_logits=requested)
    plain = cross_entropy(evaluated.logits, ids)
    torch.testing.assert_close(evaluated.loss, plain, atol=1e-6, rtol=0)  # never in evaluation

    model.train()
    trained = model(ids, labels=ids, output_router_logits=requested)
    logits = model(ids, output_router_logits=True).router_logits
    balancing = slow_balancing_loss(model.config, in_float64(logits)).float()
    assert balancing > 2
    torch.testing.assert_close(trained.loss, plain + 0.5 * balancing, atol=1e-5, rtol=0)
    shown = in_config if requested is None else requested
    assert (trained.router_logits is not None) == shown
    assert (evaluated.router_logits is not None) == shown
    assert model(ids, output_router_logits=requested).loss is None  # nor without labels


def test_balancing_trains_the_routers_only_with_a_coefficient():
    ids = tokens()
    gradients = {}
    for coefficient in (0.0, 0.01, 1.0):
        model = tiny_btx(router_aux_loss_coef=coefficient).train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        gradients[coefficient] = model.model.layers[0].mlp.gate.weight.grad
        if coefficient == 0:
            torch.testing.assert_close(loss, cross_entropy(model(ids).logits, ids), atol=1e-6, rtol=0)
            assert model(ids, labels=ids).aux_loss is None  # and costs nothing
    added = gradients[1.0] - gradients[0.0]
    assert added.abs().max() > 1e-4
    torch.testing.assert_close(gradients[0.01] - gradients[0.0], 0.01 * added, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("masked", list(MASKS))
@pytest.mark.parametrize("active", [None, [3, 1]])
@pytest.mark.parametrize("routing", ["top 2", "switch", "sample", "dense top 2"])
def test_z_loss(routing, active, masked):
    """What the loss and the logits' gradients have more with a coefficient than without one."""
    mask, ids = MASKS[masked], tokens(2, 5)
    losses, gradients = [], []
    for coefficient in (0.0, 0.5):
        model = tiny_btx(**ROUTINGS[routing], router_aux_loss_coef=0.0, router_z_loss_coef=coefficient).train()
        layers = random_logits(10, seed=2)
        torch.manual_seed(4)
        with given_logits(model, layers):
            losses.append(model(ids, attention_mask=mask, labels=ids, active_experts=active).loss)
            assert coefficient or torch.isfinite(losses[0])
        losses[-1].backward()
        gradients.append([logits.grad for logits in layers])
        with given_logits(model.eval(), layers):
            evaluated = model(ids, attention_mask=mask, labels=ids, active_experts=active)
            plain = cross_entropy(evaluated.logits, ids)
            torch.testing.assert_close(evaluated.loss, plain, atol=1e-6, rtol=0)  # never in evaluation
    slow = in_float64(layers)
    expected = slow_z_loss(slow, Routed(mask=mask, active=active))
    expected.backward()
    assert expected > 0.1
    torch.testing.assert_close((losses[1] - losses[0]).double(), 0.5 * expected.detach(), atol=2e-6, rtol=1e-5)
    for without, with_, reference in zip(*gradients, slow, strict=True):
        torch.testing.assert_close((with_ - without).double(), 0.5 * reference.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("routing", ["top 2", "switch", "soft", "dense top 2"])
def test_accumulated_micro_batches_are_the_token_weighted_mean(routing, as_tensor):
    """As Trainer calls it: every part divides by the number of labelled tokens in all parts."""
    model = tiny_btx(**ROUTINGS[routing], router_aux_loss_coef=0.3, router_z_loss_coef=0.2).train()
    ids = tokens(2, 11)
    parts = [(ids[:1], ids[:1].clone()), (ids[1:], ids[1:].clone())]
    parts[1][1][:, :8] = -100
    counts = [10, 3]  # labels that are predicted
    separate = [model(part, labels=labels) for part, labels in parts]
    expected = sum(count / 13 * out.loss for count, out in zip(counts, separate, strict=True))
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    items = torch.tensor(13) if as_tensor else 13
    together = [model(part, labels=labels, num_items_in_batch=items).loss for part, labels in parts]
    torch.testing.assert_close(sum(together), expected, atol=1e-6, rtol=0)
    for loss in together:
        loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)


# --- other heads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["top 2", "switch", "soft", "sample"])
@pytest.mark.parametrize("head", [BTXForSequenceClassification, BTXForTokenClassification])
def test_classification_heads_balance_too(head, routing):
    """In training the loss is the head's and the routers', as for the language model; in evaluation the head's."""
    config = tiny_btx(**ROUTINGS[routing], router_aux_loss_coef=0.5, router_z_loss_coef=0.25, pad_token_id=0).config
    config.num_labels = 3
    torch.manual_seed(0)
    model = head(config)
    mask, ids = MASKS["some"], tokens(2, 5).masked_fill(MASKS["some"] == 0, 0)
    labels = torch.tensor([2, 0]) if head is BTXForSequenceClassification else ids % 3
    layers = random_logits(10, seed=3)
    slow = in_float64(layers)
    torch.manual_seed(4)
    routed = Routed(training=True, mask=mask, noise=gumbel_noise(config, 10))
    expected = 0.5 * slow_balancing_loss(config, slow, routed) + 0.25 * slow_z_loss(slow, routed)
    expected.backward()
    gradients = []
    for coefficient in (0.5, 0.0):
        config.router_aux_loss_coef, config.router_z_loss_coef = coefficient, coefficient / 2
        for logits in layers:
            logits.grad = None
        torch.manual_seed(4)
        with given_logits(model.train(), layers):
            out = model(ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        plain = torch.nn.functional.cross_entropy(out.logits.flatten(0, -2), labels.flatten())
        extra = expected.detach() if coefficient else torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close((out.loss - plain).double(), extra, atol=5e-6, rtol=1e-5)
        gradients.append([logits.grad for logits in layers])
    for with_, without, reference in zip(*gradients, slow, strict=True):
        torch.testing.assert_close((with_ - without).double(), reference.grad, atol=1e-6, rtol=1e-4)
    config.router_aux_loss_coef = 0.5
    out = model.eval()(ids, attention_mask=mask, labels=labels)
    plain = torch.nn.functional.cross_entropy(out.logits.flatten(0, -2), labels.flatten())
    torch.testing.assert_close(out.loss, plain, atol=1e-6, rtol=0)


def test_the_dropout_of_a_classifier_is_as_in_transformers():
    for given, expected in (({}, 0.1), ({"classifier_dropout": None}, 0.1), ({"classifier_dropout": 0.0}, 0.0)):
        assert BTXForTokenClassification(tiny_btx(**given).config).dropout.p == expected
