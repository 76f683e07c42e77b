"""Experts switched off: for one call, on a built model, in the config. The rest renormalises.

Legend: E experts, K experts per token.
"""

from __future__ import annotations

import re

import pytest
import torch
from btx_merge.modeling import BTXConfig, BTXForCausalLM

from tests.modeling.test_routing import ROUTINGS, compare
from tests.support.models import EXPERTS, gradients_of, read_gates, readable, tiny_btx, tokens

NAMES = ["code", "math", "wiki", "seed"]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_active_experts_of_one_call(routing, training):
    """K of 3 or 4 is clamped to the two that are left."""
    compare(tiny_btx(**ROUTINGS[routing], expert_names=NAMES).train(training), active_experts=["wiki", "code"])


@pytest.mark.parametrize("active", [[1], [3, 1], [0, 1, 2], [0, 1, 2, 3]])
def test_any_number_of_active_experts(active):
    model = tiny_btx(num_experts_per_tok=3)
    compare(model, active_experts=active)
    compare(model)
    assert model.config.active_experts is None
    assert model.config.num_experts_per_tok == 3


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_masked_experts_get_no_token(routing, training):
    """Nor a gradient."""
    model = readable(tiny_btx(**ROUTINGS[routing])).train(training)
    for gates in read_gates(model, tokens(), active_experts=[1, 3]):
        assert not gates[:, [0, 2]].any()
        assert gates[:, [1, 3]].any()
    model = tiny_btx(**ROUTINGS[routing]).train(training)
    out = model(tokens(), labels=tokens(), active_experts=[1, 3])
    out.loss.backward()
    for name, gradient in gradients_of(model).items():
        assert torch.isfinite(gradient).all(), name
        if name.endswith(("gate.weight", "experts.gate_up_proj", "experts.down_proj")):
            assert not gradient[[0, 2]].any(), name


def test_active_experts_of_the_model_last_until_changed():
    model = tiny_btx(expert_names=NAMES)
    ids = tokens(2, 6)
    with torch.no_grad():
        everything = model(ids).logits
        some = model(ids, active_experts=["math", "seed"]).logits
        one = model(ids, active_experts=["wiki"]).logits
        assert torch.equal(model(ids).logits, everything)
        model.set_active_experts(["math", "seed"])
        assert torch.equal(model(ids).logits, some)
        assert torch.equal(model.model(ids)[0] @ model.lm_head.weight.T, some)
        assert torch.equal(model(ids, active_experts=["wiki"]).logits, one)  # for this call
        assert torch.equal(model(ids).logits, some)
        model.set_active_experts([1, 3])  # by index
        assert torch.equal(model(ids).logits, some)
        model.set_active_experts(None)
        assert torch.equal(model(ids).logits, everything)
        model.model.set_active_experts([3, 1])  # the decoder's own method
        torch.testing.assert_close(model(ids).logits, some, atol=1e-6, rtol=0)
    assert (some - everything).abs().max() > 0.1


def test_generate_with_active_experts():
    model = tiny_btx(expert_names=NAMES)
    expected = ids = tokens(2, 5)
    plain = model.generate(ids, **GREEDY)
    with torch.no_grad():
        for _ in range(6):
            last = model(expected, active_experts=["code"], num_experts_per_tok=1).logits[:, -1:]
            expected = torch.cat([expected, last.argmax(-1)], 1)
    assert not torch.equal(expected, plain)
    torch.testing.assert_close(model.generate(ids, active_experts=["code"], **GREEDY), expected)
    torch.testing.assert_close(model.generate(ids, active_experts=[0], num_experts_per_tok=1, **GREEDY), expected)
    torch.testing.assert_close(model.generate(ids, active_experts=["code"], use_cache=False, **GREEDY), expected)
    torch.testing.assert_close(model.generate(ids, **GREEDY), plain)
    model.set_active_experts(["code"])
    torch.testing.assert_close(model.generate(ids, **GREEDY), expected)


def test_active_experts_are_saved_only_when_asked(tmp_path):
    model = tiny_btx(expert_names=NAMES)
    with torch.no_grad():
        everything, some = model(tokens()).logits, model(tokens(), active_experts=["seed", "math"]).logits
    model.set_active_experts(["seed", "math"])
    assert model.config.active_experts is None
    model.save_pretrained(tmp_path / "not")
    model.set_active_experts(["seed", "math"], save=True)
    assert model.config.active_experts == ["seed", "math"]
    model.save_pretrained(tmp_path / "saved")
    model.set_active_experts(None, save=True)
    assert model.config.active_experts is None
    loaded = {name: BTXForCausalLM.from_pretrained(tmp_path / name) for name in ("not", "saved")}
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, everything)
        assert torch.equal(loaded["not"](tokens()).logits, everything)
        assert torch.equal(loaded["saved"](tokens()).logits, some)
        loaded["saved"].set_active_experts(None)
        assert torch.equal(loaded["saved"](tokens()).logits, everything)
    assert set(loaded["saved"].state_dict()) == set(model.state_dict())  # all the weights are there


@pytest.mark.parametrize(
    ("active", "message"),
    [
        (["code", "maths"], "'maths'.*code, math, wiki, seed"),
        ([], "active_experts"),
        ([0, EXPERTS], "active_experts.*4"),
        ([-1], "active_experts.*-1"),
        (["code", "code"], "active_experts"),
        ("code", "active_experts"),
        ([1.0], "active_experts"),
    ],
)
def test_bad_active_experts(active, message):
    model = tiny_btx(expert_names=NAMES)
    with torch.no_grad():
        before = model(tokens()).logits
    for attempt in (
        lambda: model.set_active_experts(active),
        lambda: model.set_active_experts(active, save=True),
        lambda: model(tokens(), active_experts=active),
        lambda: BTXConfig(num_local_experts=EXPERTS, expert_names=NAMES, active_experts=active),
        lambda: setattr(model.config, "active_experts", active),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert model.config.active_experts is None
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, before)


def test_names_of_a_model_without_names():
    with pytest.raises(ValueError, match=re.escape("'code'")):
        tiny_btx().set_active_experts(["code"])


def test_what_the_config_says_holds_until_the_model_is_told_otherwise():
    model = tiny_btx(expert_names=NAMES)
    with torch.no_grad():
        everyone, one = model(tokens()).logits, model(tokens(), active_experts=[2]).logits
        model.config.active_experts = [2]
        torch.testing.assert_close(model(tokens()).logits, one, atol=0, rtol=0)
        model.set_active_experts(None)
        torch.testing.assert_close(model(tokens()).logits, everyone, atol=0, rtol=0)
