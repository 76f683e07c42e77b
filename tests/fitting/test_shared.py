"""Output projections by regmean_merged, against whole models run by transformers, document by document."""

import pytest
import torch

from btx_merge import merge
from btx_merge.texts.references import DomainText
from tests.fitting.test_run import DOMAINS, fitted_documents, inputs_of, recipe_of, save_grown
from tests.support.common import LAYERS, load_float32, tensors_of

OUTPUT = "model.layers.{}.self_attn.o_proj"


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A seed and two experts far from it, untied, and text of both domains, one of them with twice the weight."""
    folder = tmp_path_factory.mktemp("grown")
    texts = save_grown(folder)
    return folder, texts | {"code": DomainText("code", texts["code"].references, 2.0)}


def slow_outputs(folder, merged, texts) -> list[torch.Tensor]:
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
    found = []
    for layer in range(LAYERS):
        states = {name: own[name][before[layer]] for name in texts}
        gram = cross = 0
        for name in texts:
            aims = dense[name][behind[layer]]
            heads = own[name][outputs[layer]]
            weighed = share[name] * heads / aims.square().mean(dim=1, keepdim=True)
            gram = gram + weighed.T @ heads
            cross = cross + weighed.T @ (aims - states[name])
        penalty = 0.01 * gram.diagonal().mean()
        prior = sum(tensors_of(folder / name)[f"{outputs[layer]}.weight"].double() for name in ("seed", *DOMAINS)) / 3
        left = gram + penalty * torch.eye(len(gram)).double()
        found.append(torch.linalg.solve(left, cross + penalty * prior.T).T)
    return found


def test_the_output_projection_is_fitted_to_the_sources_states(grown, tmp_path):
    folder, texts = grown
    merge(recipe_of(folder, texts, combine="regmean_merged"), tmp_path / "btx")
    expected, found = slow_outputs(folder, tmp_path / "btx", texts), tensors_of(tmp_path / "btx")
    for layer in range(LAYERS):
        # whole models, document by document, here; in windows and layer by layer there, in float32
        torch.testing.assert_close(
            found[f"{OUTPUT.format(layer)}.weight"].double(), expected[layer], atol=5e-5, rtol=1e-3
        )


def test_prompts_for_the_routers_change_no_shared_weight(grown, tmp_path):
    """A domain's text and its prompts bear one name."""
    folder, texts = grown
    prompts = {"router_init": "prompts", "prompts": {"code": "w1 w2 w3", "math": "w31 w32"}}
    for name, routers in (("random", {}), ("prompts", prompts)):
        merge(recipe_of(folder, texts, combine="regmean_merged", head="fitted", **routers), tmp_path / name)
    expected, found = tensors_of(tmp_path / "random"), tensors_of(tmp_path / "prompts")
    differ = {name for name in expected if not torch.equal(found[name], expected[name])}
    assert differ == {name for name in expected if name.endswith("mlp.gate.weight")}
