"""Attention in every implementation, and the model compiled and exported, for all shapes and for training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from btx_merge.modeling import BTXConfig, BTXForCausalLM

from tests.modeling.test_transformers import assert_same_gradients, gradients
from tests.support.models import tiny_btx, tokens

traces_grouped_mm = hasattr(transformers.integrations.moe, "_grouped_mm_fallback")
TRACED = [
    pytest.param(
        "grouped_mm",
        marks=pytest.mark.skipif(not traces_grouped_mm, reason="transformers 5.0 traces it in bf16 only"),
    ),
    "batched_mm",
]


MORE_COMPILED = [("aot_eager", False), ("inductor", True)]  # each a variation that takes seconds


# --- implementations of attention ------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", ["nothing", "left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_attention_implementations_agree(implementation, padded):
    """flex_attention without its compiled kernel, and without gradients, which torch has for accelerators only."""
    model = tiny_btx(head_dim=16, attn_implementation="eager")
    ids, mask = tokens(), torch.ones(2, 11, dtype=torch.long)
    real = {"nothing": slice(0, 11), "left": slice(4, 11), "right": slice(0, 7)}[padded]
    mask[1] = 0
    mask[1, real] = 1
    outputs = {}
    for name in ("eager", implementation):
        model.set_attn_implementation(name)
        with torch.compiler.set_stance("force_eager"), torch.set_grad_enabled(name != "flex_attention"):
            logits = model(ids, attention_mask=mask).logits
        outputs[name] = torch.cat([logits[0], logits[1, real]])
    torch.testing.assert_close(outputs[implementation], outputs["eager"], atol=1e-5, rtol=0)
    if implementation == "sdpa":
        by_name = {name: gradients(model, logits.square().sum()) for name, logits in outputs.items()}
        assert_same_gradients(by_name["sdpa"], by_name["eager"])


@pytest.mark.slow
@torch.no_grad()
def test_compiled_flex_attention():
    model = tiny_btx(head_dim=16)
    expected = model(tokens()).logits
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has flex_attention's backward on accelerators only")
def test_flex_attention_with_gradients():
    model = tiny_btx(head_dim=16).cuda()
    expected = gradients(model, model(tokens().cuda()).logits.sum())
    model.set_attn_implementation("flex_attention")
    ours = gradients(model, model(tokens().cuda()).logits.sum())
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-3 * gradient.abs().max().item(), rtol=0, msg=name)


def test_the_implementation_of_attention_can_be_set_anywhere(tmp_path):
    values = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = BTXConfig(**values, attn_implementation="eager")
    assert config._attn_implementation == "eager"
    config._attn_implementation = "sdpa"
    model = BTXForCausalLM(config)
    assert model.config is model.model.config
    assert model.config._attn_implementation == "sdpa"
    assert BTXForCausalLM(BTXConfig(**values)).config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="no_such_attention"):
        model.set_attn_implementation("no_such_attention")
    assert model.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    assert BTXForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    loaded = BTXForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"


# --- compiled and exported -------------------------------------------------------------------------------------


class Counting:
    """A backend of torch.compile that runs its graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("implementation", TRACED)
def test_compiled_without_a_break_for_every_shape(implementation):
    """A graph or two, until the sizes are known to change; none for the shapes that come later."""
    model = tiny_btx()
    model.set_experts_implementation(implementation)
    backend = Counting()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    graphs = []
    with torch.no_grad():
        for batch, length in ((2, 11), (3, 17), (5, 8)):
            ids = tokens(batch, length)
            mask = torch.ones_like(ids)
            mask[0, :3] = 0
            logits = compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits
            torch.testing.assert_close(logits, model(ids, attention_mask=mask).logits, atol=1e-5, rtol=0)
            graphs.append(backend.graphs)
    assert graphs[0] == 1
    assert graphs[1] == graphs[2] <= 3


@pytest.mark.parametrize("implementation", TRACED)
@pytest.mark.parametrize(
    ("backend", "used"),
    [("aot_eager", True), *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE_COMPILED)],
)
def test_compiled_for_training(backend, used, implementation):
    """Without a break, with the balancing loss, whether or not the model has run before it is compiled."""
    model = tiny_btx(router_aux_loss_coef=1.0).train()
    model.set_experts_implementation(implementation)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids, "use_cache": False}
    reference = model if used else copy.deepcopy(model)
    plain = reference(**inputs).loss
    expected = gradients(reference, plain)
    torch.compiler.reset()
    loss = torch.compile(model, fullgraph=True, backend=backend)(**inputs).loss
    torch.testing.assert_close(loss, plain)
    assert_same_gradients(gradients(model, loss), expected)


@pytest.mark.parametrize("implementation", TRACED)
@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_exported_for_every_shape(strict, implementation):
    model = tiny_btx()
    model.set_experts_implementation(implementation)
    mask = torch.ones(2, 11, dtype=torch.long)
    inputs = {"input_ids": tokens(), "attention_mask": mask, "use_cache": False}
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    shapes = {"input_ids": free, "attention_mask": free, "use_cache": None}
    torch.compiler.reset()
    exported = torch.export.export(model, (), inputs, strict=strict, dynamic_shapes=shapes).module()
    for batch, length in ((2, 11), (3, 17), (5, 8)):
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, :3] = 0
        inputs = {"input_ids": tokens(batch, length), "attention_mask": mask, "use_cache": False}
        torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)
