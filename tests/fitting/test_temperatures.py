"""The factor on a fitted router, against the layer itself run with each factor, and against every expert by itself."""

import pytest
import torch
from btx_merge.modeling.configuration_btx import BTXConfig
from btx_merge.modeling.modeling_btx import BTXDecoderLayer

from btx_merge import FitRecipe, Options, fit, merge
from btx_merge.fitting.equations import Statistics
from btx_merge.fitting.temperatures import TEMPERATURES, HeldOutTokens, Temperatures
from tests.fitting.test_run import DOMAINS, recipe_of, save_grown
from tests.support.common import load_float32

HIDDEN, EXPERTS = 16, 5


def relative_error(output: torch.Tensor, before: torch.Tensor, aim: torch.Tensor) -> float:
    """Of what is added to states, each token relative to the length of the state that it should come to."""
    target, length = aim - before, aim.square().sum(dim=-1, keepdim=True)
    return float(((output - target).square() / length).sum() / (target.square() / length).sum())


def test_the_factor_of_a_fit_is_the_best_of_those_tried(tmp_path):
    """By running the merged layer with each, on what a domain's own block gives."""
    texts = save_grown(tmp_path)
    merge(recipe_of(tmp_path), tmp_path / "btx")
    report = fit(
        FitRecipe(str(tmp_path / "btx"), "ridge", domain_text=tuple(texts.values())),
        tmp_path / "fitted",
        Options(statistics=tmp_path / "statistics"),
    )
    fitted = load_float32(tmp_path / "fitted").model.layers[0].requires_grad_(False)
    layer, norm = fitted.mlp, fitted.post_attention_layernorm
    blocks = {name: load_float32(tmp_path / name).model.layers[0].mlp.requires_grad_(False) for name in DOMAINS}
    moments = Statistics(tmp_path / "statistics", {}).get("layer-000.router", dict)
    unit = layer.gate.weight.data / report.layers[0].temperature
    errors = {}
    for factor in TEMPERATURES:
        layer.gate.weight.data = factor * unit
        found = []
        for name in DOMAINS:
            states = moments[f"states.{name}"][None]
            read = norm(states)
            found.append(relative_error(layer(read), states, states + blocks[name](read)))
        errors[factor] = sum(found) / 2
    assert report.layers[0].temperature == min(errors, key=lambda factor: errors[factor])
    assert report.layers[0].error == pytest.approx(min(errors.values()), rel=1e-3)
    assert report.layers[0].own_error == 0


ROUTINGS = {
    "top_k": {"num_experts_per_tok": 2},
    "pre_softmax": {"num_experts_per_tok": 2, "router_pre_softmax": True},
    "biased": {"num_experts_per_tok": 2, "router_selection_bias": True},  # whom a factor sends where depends on it
    "switch": {"router_type": "switch"},
    "soft": {"router_type": "soft"},
    "sample_top_1": {"router_type": "sample_top_1"},
}


@torch.no_grad()
@pytest.mark.parametrize("rows", [range(EXPERTS), [3]], ids=["all", "one"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_it_is_what_running_the_layer_with_each_factor_gives(routing, rows):
    torch.manual_seed(0)
    config = BTXConfig(
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_attention_heads=2,
        num_local_experts=EXPERTS,
        expert_names=["a", "b.0", "b.1", "c", "d"],
        experts_implementation="eager",
        **ROUTINGS[routing],
    )
    config._experts_implementation = "eager"
    layer = BTXDecoderLayer(config, 1).eval()
    for parameter in layer.parameters():
        parameter.normal_(std=0.3)
    if routing == "biased":
        layer.mlp.routing.e_score_correction_bias.copy_(torch.linspace(-0.4, 0.4, EXPERTS))
    stored, solution = layer.mlp.gate.weight.clone(), 0.1 * torch.randn(EXPERTS, HIDDEN)
    before = torch.randn(2, 40, HIDDEN)
    before[:, 0] *= 100  # as the first tokens of many models have it
    inputs = layer.post_attention_layernorm(before)
    own = [[1, 2], [3]]
    aims = [None, before[1] + torch.randn(40, HIDDEN)]
    texts = [HeldOutTokens(*each) for each in zip(own, before, aims, strict=True)]
    trial = Temperatures(layer, solution, rows, texts, config.num_experts_per_tok)
    found, router = trial.best(7)

    def expert(number: int, read: torch.Tensor) -> torch.Tensor:
        gate, up = (read @ layer.mlp.experts.gate_up_proj[number].T).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ layer.mlp.experts.down_proj[number].T

    by_own = [sum(expert(number, read) for number in numbers) for numbers, read in zip(own, inputs, strict=True)]
    aims[0] = before[0] + by_own[0]
    errors, accuracies = {}, {}
    for factor in TEMPERATURES:
        weight = stored.clone()
        weight[[*rows]] = factor * solution[[*rows]]
        layer.mlp.gate.weight.copy_(weight)
        outputs = [layer.mlp(read[None])[0] for read in inputs]
        errors[factor] = sum(map(relative_error, outputs, before, aims)) / 2
        right = [
            float(sum(int(token) in numbers for token in (read @ weight.T).argmax(dim=-1)) / 40)
            for numbers, read in zip(own, inputs, strict=True)
        ]
        accuracies[factor] = sum(right) / 2
    best = min(errors, key=lambda factor: round(errors[factor], 6))  # the first of equals is the softest
    expected = stored.clone()
    expected[[*rows]] = best * solution[[*rows]]
    # that the factors differ in what they do; the one token's expert of sample_top_1 is the same by all
    assert len({round(error, 4) for error in errors.values()}) > 3 or (routing, len(rows)) == ("sample_top_1", EXPERTS)
    assert found.layer == 7
    assert found.temperature == best
    assert torch.equal(router, expected)
    assert found.error == pytest.approx(errors[best], abs=2e-6)  # it is rounded there
    assert found.own_error == pytest.approx(relative_error(by_own[1], before[1], aims[1]) / 2, rel=1e-5)
    assert found.accuracy == pytest.approx(accuracies[best])
