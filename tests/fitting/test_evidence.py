"""Output projections and the marks that they leave, against whole models run by transformers, document by document."""

import pytest
import torch

from btx_merge import InputError, MergeRecipe, merge
from btx_merge.fitting.equations import Statistics
from btx_merge.options import Options
from btx_merge.texts.references import DomainText
from tests.fitting.test_run import DOMAINS, fitted_documents, inputs_of, recipe_of, save_grown
from tests.support.common import LAYERS, files_of, load_float32, tensors_of

OUTPUT = "model.layers.{}.self_attn.o_proj"


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A seed and two experts far from it, untied, and text of both domains, one of them with twice the weight."""
    folder = tmp_path_factory.mktemp("grown")
    texts = save_grown(folder)
    return folder, texts | {"code": DomainText("code", texts["code"].references, 2.0)}


def slow_outputs(folder, merged, texts, evidence: float) -> list[torch.Tensor]:
    """Solve for every layer's output projection from what whole models read: [H, Q] by layer, in float64."""
    model = load_float32(merged)
    before = [f"model.layers.{layer}.input_layernorm" for layer in range(LAYERS)]
    behind = [f"model.layers.{layer}.post_attention_layernorm" for layer in range(LAYERS)]
    outputs = [OUTPUT.format(layer) for layer in range(LAYERS)]
    own, dense, share = {}, {}, {}
    for name, text in texts.items():
        tokens = fitted_documents(text)
        own[name] = inputs_of(model, before + outputs, tokens, active_experts=[name])
        dense[name] = inputs_of(load_float32(folder / name), behind, tokens)
        share[name] = text.weight / len(dense[name][behind[0]])
    first = 0
    for name in texts:
        states = dense[name][behind[0]]
        first = first + share[name] * states.T @ (states / states.square().sum(dim=1, keepdim=True))
    empty = torch.linalg.eigh(first).eigenvectors[:, : len(texts)].T
    mean = empty.mean(dim=0)
    found = []
    for layer in range(LAYERS):
        states = {name: own[name][before[layer]] for name in texts}
        gram = cross = 0
        for number, name in enumerate(texts):
            marks = evidence * states[name].norm(dim=1, keepdim=True) * (empty[number] - mean)
            aims = dense[name][behind[layer]] + marks
            heads = own[name][outputs[layer]]
            weighed = share[name] * heads / aims.square().mean(dim=1, keepdim=True)
            gram = gram + weighed.T @ heads
            cross = cross + weighed.T @ (aims - states[name])
        penalty = 0.01 * gram.diagonal().mean()
        prior = sum(tensors_of(folder / name)[f"{outputs[layer]}.weight"].double() for name in ("seed", *DOMAINS)) / 3
        left = gram + penalty * torch.eye(len(gram)).double()
        found.append(torch.linalg.solve(left, cross + penalty * prior.T).T)
    return found


@pytest.mark.parametrize("evidence", [0.0, 0.15, 0.6])
def test_the_output_projection_is_fitted_to_the_sources_states_and_the_mark(grown, tmp_path, evidence):
    folder, texts = grown
    merge(recipe_of(folder, texts, combine="regmean_merged", evidence=evidence), tmp_path / "btx")
    expected, found = slow_outputs(folder, tmp_path / "btx", texts, evidence), tensors_of(tmp_path / "btx")
    for layer in range(LAYERS):
        # whole models, document by document, here; in windows and layer by layer there, in float32
        torch.testing.assert_close(
            found[f"{OUTPUT.format(layer)}.weight"].double(), expected[layer], atol=5e-5, rtol=1e-3
        )


def test_states_have_the_mark_of_their_domain(grown, tmp_path):
    """Behind attention, along the difference of the two domains' directions, relative to their size."""
    folder, texts = grown
    apart = {}
    for evidence in (0.0, 0.3):
        out = tmp_path / f"{evidence}"
        merge(recipe_of(folder, texts, combine="regmean_merged", evidence=evidence), out)
        model, name = load_float32(out), "model.layers.1.post_attention_layernorm"
        states = [inputs_of(model, [name], fitted_documents(texts[d]), active_experts=[d])[name] for d in DOMAINS]
        dense = "model.layers.0.post_attention_layernorm"
        first = 0
        for domain, text in texts.items():
            rows = inputs_of(load_float32(folder / domain), [dense], fitted_documents(text))[dense]
            first = first + text.weight / len(rows) * rows.T @ (rows / rows.square().sum(dim=1, keepdim=True))
        one, two = torch.linalg.eigh(first).eigenvectors[:, :2].T
        means = [float((rows @ (one - two)).mean() / rows.square().sum(dim=1).mean().sqrt()) for rows in states]
        apart[evidence] = means[0] - means[1]
    assert apart[0.3] > apart[0.0] + 0.15


def test_the_card_the_recipe_and_the_statistics_know_it(grown, tmp_path):
    folder, texts = grown
    recipe = recipe_of(folder, texts, combine="regmean_merged", router_init="ridge", evidence=0.15)
    merge(recipe, folder / "marked", Options(statistics=tmp_path / "statistics"))
    assert "with marks of the domain (evidence 0.15)" in (folder / "marked/README.md").read_text()
    again = MergeRecipe.from_yaml(folder / "marked", domain_text=texts)
    assert again.evidence == 0.15
    merge(again, tmp_path / "again", Options(statistics=tmp_path / "statistics"))
    assert files_of(tmp_path / "again") == files_of(folder / "marked")
    with pytest.raises(InputError, match="collected with another evidence"):
        Statistics(tmp_path / "statistics", {"evidence": 0.0})


@pytest.mark.parametrize("combine", ["mean", "regmean"])
def test_nothing_else_can_leave_marks(combine):
    texts = {"code": "code.jsonl"}
    with pytest.raises(
        InputError, match=rf"evidence: 0.15, with combine: {combine}; expected combine: regmean_merged"
    ):
        MergeRecipe("seed", {"code": "a"}, combine=combine, router_init="ridge", domain_text=texts, evidence=0.15)
    with pytest.raises(InputError, match="evidence: -1"):
        MergeRecipe("seed", {"code": "a"}, evidence=-1)
