"""Routers by multinomial logistic regression, against Newton's method with the whole Hessian in float64."""

import pytest
import torch

from btx_merge import FitRecipe, InputError, Options, fit, info, merge
from btx_merge.fitting.logistic import Labelled, logistic_solution
from btx_merge.texts.references import DomainText
from tests.fitting.test_run import (
    GATE,
    assert_same_direction,
    fitted_documents,
    inputs_of,
    recipe_of,
    save_grown,
)
from tests.support.common import LAYERS, files_of, load_float32, tensors_of

PENALTY = 1e-4
NEAR_THE_OPTIMUM = 1e-5
"""A gradient at which rows can be compared. The product ends sooner: what is missing then is in the loss' last digits.
"""


@pytest.fixture
def to_the_end(monkeypatch):
    monkeypatch.setattr("btx_merge.fitting.logistic._GRADIENT", NEAR_THE_OPTIMUM)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A seed and two experts far from it, and text of both domains, one of them with twice the weight."""
    folder = tmp_path_factory.mktemp("grown")
    texts = save_grown(folder)
    return folder, texts | {"code": DomainText("code", texts["code"].references, 2.0)}


def newton(
    inputs: list[torch.Tensor], shares: list[float], fixed: torch.Tensor, fitted: int | None = None, steps: int = 40
) -> torch.Tensor:
    """Minimise the weighed loss of tokens [N, H] of each domain: [D, H]. Weights of a domain add up to its share.

    Args:
        fixed: rows that stay, [F, H].
        fitted: D, the domains whose rows are fitted; all by default. Those behind have the first rows that stay.
    """
    domains, hidden = fitted or len(inputs), inputs[0].shape[1]
    x = torch.cat(inputs)
    label = torch.cat([torch.full((len(part),), i) for i, part in enumerate(inputs)])
    weight = torch.cat(
        [torch.full((len(part),), s / len(part)).double() for s, part in zip(shares, inputs, strict=True)]
    )
    penalty = PENALTY * ((weight @ x.square()).mean())
    own = torch.nn.functional.one_hot(label, domains + len(fixed))[:, :domains]
    rows = torch.zeros(domains, hidden).double()
    for _ in range(steps):
        p = (x @ torch.cat([rows, fixed.double()]).T).softmax(dim=1)[:, :domains]
        gradient = ((p - own) * weight[:, None]).T @ x + penalty * rows
        curve = torch.diag_embed(p) - p[:, :, None] * p[:, None]  # of the softmax, [N, D, D]
        hessian = torch.einsum("n,nij,na,nb->iajb", weight, curve, x, x).reshape(domains * hidden, -1)
        hessian += penalty * torch.eye(domains * hidden).double()
        rows = rows - torch.linalg.solve(hessian, gradient.flatten()).reshape(rows.shape)
        if gradient.abs().max() < 1e-12:  # the last step was from there
            break
    assert gradient.abs().max() < 1e-10
    return rows


@pytest.mark.parametrize(("fitted", "fixed"), [(3, 0), (3, 1), (3, 2), (2, 1), (1, 3)])
@pytest.mark.parametrize("start", [0.0, 3.0])
def test_it_comes_to_the_optimum_from_anywhere(start, fitted, fixed, monkeypatch):
    """With as many rows that stay: zero where they are of domains without text, as when all three have rows."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-1, 1, 12)  # badly scaled, as hidden states are
    inputs = [(torch.randn(300, 12, generator=generator) + 0.3 * number) * scales for number in range(3)]
    shares = [0.5, 0.25, 0.25]
    gram = sum(share * x.T.double() @ x.double() / len(x) for share, x in zip(shares, inputs, strict=True))
    passes = []
    gain = torch.rand(12, generator=generator) + 0.5
    sizes = torch.rand(300, generator=generator) + 0.5  # of a norm in front of the router
    stay = torch.zeros(fixed, 12) if fitted == 3 else 0.2 * torch.randn(fixed, 12, generator=generator) / scales

    def batches():
        passes.append(1)
        for domain, (share, x) in enumerate(zip(shares, inputs, strict=True)):
            yield from (
                Labelled(part / gain / scale[:, None], scale, domain, share / len(x))
                for part, scale in zip(x.split(128), sizes.split(128), strict=True)
            )

    expected = newton([x.double() for x in inputs], shares, stay, fitted)
    found = logistic_solution(batches, gain, gram, torch.full((fitted, 12), start), PENALTY, stay)
    optimum = loss_of(expected, inputs, shares, stay)
    assert optimum <= loss_of(found.double(), inputs, shares, stay) < optimum + 1e-5  # nats per token
    assert len(passes) < 50
    # nearer to it, the rows themselves are the same, as far as passes in float32 can tell
    monkeypatch.setattr("btx_merge.fitting.logistic._GRADIENT", NEAR_THE_OPTIMUM)
    found = logistic_solution(batches, gain, gram, torch.full((fitted, 12), start), PENALTY, stay)
    torch.testing.assert_close(found.double(), expected, atol=1e-3 * float(expected.abs().max()), rtol=0)


def loss_of(rows: torch.Tensor, inputs: list[torch.Tensor], shares: list[float], fixed: torch.Tensor) -> float:
    """Return the weighed loss of tokens [N, H] of each domain, in nats, with the penalty on rows [D, H]."""
    loss = square = torch.zeros(())
    for domain, (share, x) in enumerate(zip(shares, inputs, strict=True)):
        logits = x.double() @ torch.cat([rows, fixed.double()]).T
        labels = torch.full((len(x),), domain)
        loss = loss + share * torch.nn.functional.cross_entropy(logits, labels)
        square = square + share * x.double().square().mean()
    return float(loss + PENALTY / 2 * square * rows.square().sum())


@pytest.mark.usefixtures("to_the_end")
@pytest.mark.parametrize("mode", ["whole", "split"])
def test_it_is_the_regression_on_the_routers_true_input(grown, tmp_path, mode):
    folder, texts = grown
    merge(recipe_of(folder, expert_mode=mode), tmp_path / "btx")
    recipe = FitRecipe(str(tmp_path / "btx"), "logistic", tuple(texts.values()))
    report = fit(recipe, tmp_path / "fitted")
    model = load_float32(tmp_path / "btx")
    gates = [f"model.layers.{layer}.mlp.gate" for layer in range(LAYERS)]
    chunks = 2 if mode == "split" else 1
    after = tensors_of(tmp_path / "fitted")
    layers = range(1 if mode == "split" else LAYERS)  # gates of a whole model would halve the chunks on their way up
    for layer in layers:
        found = after[GATE.format(layer)]
        inputs = [
            inputs_of(model, gates[: layer + 1], fitted_documents(text), active_experts=[name])[gates[layer]]
            if mode == "whole"
            else inputs_of(model, gates[:1], fitted_documents(text))[gates[0]]
            for name, text in texts.items()
        ]
        expected = newton(inputs, [2 / 3, 1 / 3], torch.zeros(1, 64))  # the seed has no text
        factor = assert_same_direction(found[chunks::chunks], expected, 3e-3)
        assert factor == pytest.approx(report.layers[layer].temperature, rel=3e-3)
        assert torch.equal(found[chunks::chunks], found[chunks + (chunks - 1) :: chunks])  # chunks share a row
        assert not found[:chunks].any()  # the seed, which has no text


@pytest.mark.usefixtures("to_the_end")
def test_beginning_with_a_few_batches_comes_to_the_same_rows(grown, tmp_path, monkeypatch):
    folder, texts = grown
    monkeypatch.setattr("btx_merge.fitting.streams._TOKENS_AT_ONCE", 256)
    given: list[list[int]] = []  # of each call, how many batches the domains have

    def told(batches, *rest):
        counts = [0, 0]
        for batch in batches():
            counts[batch.domain] += 1
        given.append(counts)
        return logistic_solution(batches, *rest)

    monkeypatch.setattr("btx_merge.fitting.routers.logistic_solution", told)
    merge(recipe_of(folder, texts, router_init="logistic"), tmp_path / "whole")
    whole = given.copy()
    assert len(whole) == LAYERS
    monkeypatch.setattr("btx_merge.fitting.routers._FEW_BATCHES", 2)
    merge(recipe_of(folder, texts, router_init="logistic"), tmp_path / "begun")
    begun = given[LAYERS:]
    assert begun[1::2] == whole
    assert all(2 <= min(few) < min(all_of_them) / 2 for few, all_of_them in zip(begun[::2], whole, strict=True))
    found, expected = (tensors_of(tmp_path / name)[GATE.format(0)] for name in ("begun", "whole"))
    assert_same_direction(found, expected.double(), 3e-3)


def test_merging_with_it_is_merging_then_fitting_and_the_same_every_time(grown, tmp_path):
    folder, texts = grown
    merge(recipe_of(folder), tmp_path / "btx")
    fit(FitRecipe(str(tmp_path / "btx"), "logistic", tuple(texts.values())), tmp_path / "fitted")
    for name in ("one", "two"):
        merge(recipe_of(folder, texts, router_init="logistic"), tmp_path / name)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    fitted, merged = tensors_of(tmp_path / "fitted"), tensors_of(tmp_path / "one")
    assert all(torch.equal(fitted[name], merged[name]) for name in merged)
    assert "fitted by logistic regression" in (tmp_path / "one/README.md").read_text()
    assert "by logistic regression on text" in (tmp_path / "fitted/README.md").read_text()
    assert info(str(tmp_path / "one")).routers == "fitted"
    assert not info(str(tmp_path / "one")).untrained


def test_it_cannot_be_solved_from_statistics(grown, tmp_path):
    folder, texts = grown
    options = Options(statistics=tmp_path / "statistics")
    said = r"--statistics: .*for logistic routers.*expected ridge routers.*Say {} ridge{}, or leave --statistics out"
    mean = "--combine mean --head combined --router-init", " --fit-through expert"
    all_of_it = "--combine regmean_merged --head fitted --router-init", " --fit-through router"
    for values, words in ({"router_init": "logistic"}, mean), ({}, all_of_it):  # text alone asks for them
        with pytest.raises(InputError, match=said.format(*words)) as caught:
            merge(recipe_of(folder, texts, **values), tmp_path / "out", options)
        assert len(caught.value.problems) == 1
    merge(recipe_of(folder), tmp_path / "btx")
    with pytest.raises(InputError, match=said.format("--method", "")):
        fit(FitRecipe(str(tmp_path / "btx"), domain_text=tuple(texts.values())), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "statistics").exists()
