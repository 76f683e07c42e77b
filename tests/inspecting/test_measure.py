"""What is measured, against slow loops: routes by plain hooks, losses by the slow model in float64."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from btx_merge.errors import NonFiniteError
from btx_merge.inspecting.figures import DomainFigures
from btx_merge.inspecting.measure import Inspection, Switches
from btx_merge.inspecting.page_text import PageText
from btx_merge.inspecting.routes import Routes, running_experts
from btx_merge.measuring.windows import Window, windows_of
from tests.support.common import VOCAB, WORDS, tiny_tokenizer
from tests.support.models import Routed, slow_gates, slow_logits, tiny_btx, weights_of

KINDS: dict[str, dict[str, Any]] = {
    "top_k": {"expert_names": ["seed", "code", "math", "bio"]},
    "split": {"expert_names": ["code.0", "code.1", "math.0", "math.1"], "num_chunks": 2, "router_pre_softmax": True},
    "soft": {"router_type": "soft", "expert_names": ["seed", "code", "math", "bio"]},
    "switch": {"router_type": "switch", "expert_names": ["seed", "code", "math", "bio"]},
    "sample_top_1": {"router_type": "sample_top_1", "expert_names": ["seed", "code", "math", "bio"]},
    "bias": {"router_selection_bias": True, "expert_names": ["seed", "code", "math", "bio"]},
    "some are off": {"expert_names": ["seed", "code", "math", "bio"], "active_experts": ["math", 1, "seed"]},
    "no names": {"num_local_experts": 2},
}


def model_of(kind: str) -> Any:
    model = tiny_btx(vocab_size=VOCAB, bos_token_id=126, eos_token_id=127, **KINDS[kind])
    for layer in model.model.layers:
        if layer.mlp.routing.has_bias:
            layer.mlp.routing.e_score_correction_bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1]))
    return model


def windows(documents: int = 4) -> list[Window]:
    """Several of most documents, the last of them with context; one document is a single token."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS[:100], k=size)) for size in [12, 1, *[9] * documents][:documents]]
    return list(windows_of(texts, tiny_tokenizer(), 5))


def inspected(model: Any, given: list[Window], page_tokens: int = 0) -> tuple[DomainFigures, PageText]:
    experts = running_experts(model.config.to_dict())
    routes = Routes(model, experts)
    page = PageText("code", page_tokens, routes.num_layers, len(experts))
    inspection = Inspection(model, tiny_tokenizer(), routes, Switches.of(experts), 11, lambda count: None)
    return inspection.domain("code", given, page), page


class Slow:
    """One window after the other, without padding: the gates of each position, and the losses, in float64."""

    def __init__(self, model: Any):
        self.model, self.config = model, model.config
        self.weights = {name: value.detach() for name, value in weights_of(model).items()}
        self.active = self.config.expert_numbers(self.config.active_experts)
        self.bias = [
            layer.mlp.routing.e_score_correction_bias for layer in model.model.layers if layer.mlp.routing.has_bias
        ]

    def losses(self, window: Window, active: list[int]) -> list[float]:
        """-log p of each scored token."""
        routed = Routed(active=active, bias=self.bias)
        logits = slow_logits(self.config, self.weights, torch.tensor([window.ids[:-1]]), routed)[0]
        return [
            float(torch.logsumexp(logits[place - 1], 0) - logits[place - 1, window.ids[place]])
            for place in range(len(window.ids) - window.scored, len(window.ids))
        ]

    def routers(self, window: Window) -> list[torch.Tensor]:
        """The router logits of each layer, by a hook on the gates' linear layers; of positions that hold text and
        predict a scored token."""
        seen: list[torch.Tensor] = []
        handles = [
            layer.mlp.gate.register_forward_hook(lambda _, __, out: seen.append(out.double()))
            for layer in self.model.model.layers
        ]
        with torch.no_grad():
            self.model(torch.tensor([window.ids[:-1]]))
        for handle in handles:
            handle.remove()
        first = len(window.ids) - 1 - window.scored
        return [logits[max(first, 1) if window.offset == 0 else first :] for logits in seen]

    def gates(self, logits: torch.Tensor, layer: int) -> list[list[float]]:
        """[N][E]"""
        routed = Routed(active=self.active, bias=self.bias)
        return [[float(x) for x in slow_gates(self.config, row, layer, 0, routed)] for row in logits]


@pytest.mark.parametrize("kind", KINDS)
def test_routes_are_those_of_a_slow_loop(kind: str) -> None:
    model = model_of(kind)
    given = windows()
    slow, experts = Slow(model), running_experts(model.config.to_dict())
    figures, _ = inspected(model, given)
    assert figures.tokens == sum(window.scored for window in given)
    assert figures.routed == figures.tokens - 4  # the last token of each document
    for layer in range(model.config.num_hidden_layers):
        rows = [(row, gates) for w in given for row, gates in pairs(slow, slow.routers(w)[layer], layer)]
        assert len(rows) == figures.routed
        chosen = sum(gate > 0 for _, gates in rows for gate in gates)
        entropy = 0.0
        first = dict.fromkeys(experts, 0)
        for row, gates in rows:
            by_expert = {name: sum(gates[number] for number in numbers) for name, numbers in experts.items()}
            first[max(by_expert, key=lambda name: by_expert[name])] += 1
            total = sum(math.exp(row[number]) for number in slow.active)
            for numbers in experts.values():
                p = sum(math.exp(row[number]) for number in numbers) / total
                entropy -= p * math.log(p) / len(rows)
        assert figures.entropy[layer] == pytest.approx(entropy, rel=1e-4)
        for column, (name, numbers) in enumerate(experts.items()):
            share = sum(gates[number] > 0 for _, gates in rows for number in numbers) / chosen
            weight = sum(gates[number] for _, gates in rows for number in numbers) / len(rows)
            assert figures.share[layer][column] == pytest.approx(share)
            assert figures.weight[layer][column] == pytest.approx(weight, rel=1e-4, abs=1e-5)
            assert figures.first[layer][column] == pytest.approx(first[name] / len(rows))


def pairs(slow: Slow, logits: torch.Tensor, layer: int) -> list[tuple[list[float], list[float]]]:
    return list(zip(logits.tolist(), slow.gates(logits, layer), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_ablation_and_regret_are_those_of_the_slow_model(kind: str) -> None:
    model = model_of(kind)
    given = windows(3)
    slow, experts = Slow(model), running_experts(model.config.to_dict())
    figures, _ = inspected(model, given)
    routed = [loss for window in given for loss in slow.losses(window, slow.active)]
    assert figures.loss == pytest.approx(sum(routed) / len(routed), rel=1e-5)
    assert list(figures.without) == list(figures.alone) == list(experts)
    alone = []
    for name, numbers in experts.items():
        others = [number for number in slow.active if number not in numbers]
        without = [loss for window in given for loss in slow.losses(window, others)]
        assert figures.without[name] == pytest.approx(sum(without) / len(without), rel=1e-5)
        alone.append([loss for window in given for loss in slow.losses(window, list(numbers))])
        assert figures.alone[name] == pytest.approx(sum(alone[-1]) / len(alone[-1]), rel=1e-5)
    best = [min(losses) for losses in zip(*alone, strict=True)]
    regrets = [loss - least for loss, least in zip(routed, best, strict=True)]
    assert figures.regret == pytest.approx(sum(regrets) / len(regrets), abs=1e-5)
    worst = sorted(regrets, reverse=True)[:12]
    assert [item.regret for item in figures.worst] == pytest.approx(worst, abs=1e-4)
    for item in figures.worst:
        place = min(range(len(regrets)), key=lambda place: abs(regrets[place] - item.regret))
        assert item.loss == pytest.approx(routed[place], abs=1e-4)
        assert item.best == list(experts)[min(range(len(experts)), key=lambda row: alone[row][place])]
        assert item.token.strip() == WORDS[[i for w in given for i in w.ids[-w.scored :]][place]]


def test_the_worst_tokens_stand_in_their_text() -> None:
    figures, _ = inspected(model_of("top_k"), windows(1))
    (text,) = [" ".join(WORDS[i] for w in windows(1) for i in w.ids[-w.scored :])]
    assert len(figures.worst) == 12
    for item in figures.worst:
        assert (item.before + item.token + item.after).strip() in text
        assert "<s>" not in item.before


def test_an_only_expert_cannot_be_switched_off() -> None:
    model = model_of("no names")
    model.config.active_experts = [1]
    figures, _ = inspected(model, windows(2))
    assert figures.without == {}
    assert figures.alone == {"1": pytest.approx(figures.loss)}
    assert figures.regret == pytest.approx(0)


def test_of_two_experts_each_pass_is_made_once() -> None:
    passes: list[int] = []
    model = model_of("no names")
    experts = running_experts(model.config.to_dict())
    inspection = Inspection(model, tiny_tokenizer(), Routes(model, experts), Switches.of(experts), 99, passes.append)
    given = windows(2)
    inspection.domain("code", given, PageText("code", 0, 2, 2))
    nbytes = sum(window.nbytes for window in given)
    assert sum(passes) == (1 + Switches.of(experts).passes) * nbytes == 3 * nbytes


def test_nothing_is_switched_where_nobody_asks() -> None:
    model = model_of("top_k")
    experts = running_experts(model.config.to_dict())
    inspection = Inspection(model, tiny_tokenizer(), Routes(model, experts), Switches((), ()), 99, lambda count: None)
    page = PageText("code", 10, 2, 4)
    figures = inspection.domain("code", windows(2), page)
    assert (figures.without, figures.alone, figures.regret, figures.worst) == ({}, {}, None, ())
    assert page.to_dict()["alone"] == ""


def test_memory_does_not_grow_with_the_text() -> None:
    """Of many windows few are alive at a time, and what is kept of them has a size of its own."""
    alive: weakref.WeakSet[Window] = weakref.WeakSet()
    most = 0

    def many() -> Iterator[Window]:
        nonlocal most
        for number in range(120):
            window = Window((126, *(number % 90 + place for place in range(5))), 5, number, 0, 20)
            alive.add(window)
            yield window
            most = max(most, len(alive))

    model = model_of("no names")
    experts = running_experts(model.config.to_dict())
    page = PageText("code", 30, 2, 2)
    inspection = Inspection(model, tiny_tokenizer(), Routes(model, experts), Switches.of(experts), 10, lambda n: None)
    figures = inspection.domain("code", many(), page)
    assert figures.tokens == 600
    assert most <= 16 * 10 // 5 + 1
    assert len(figures.worst) == 12
    assert len(page.to_dict()["tokens"]) == 30


def test_a_loss_that_is_no_number_ends_it() -> None:
    model = model_of("no names")
    with torch.no_grad():
        model.lm_head.weight[7] = math.nan
    with pytest.raises(NonFiniteError, match=r"^code: the model's loss is not finite\. Nothing was written\.$"):
        inspected(model, windows(2))


def test_the_hooks_are_gone_afterwards() -> None:
    model = model_of("top_k")
    inspected(model, windows(2))
    assert not [module for module in model.modules() if module._forward_hooks]
