"""A LoRA on a merged model is saved, loaded and merged by the real peft; and what `lora_config` refuses."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import Any

import peft
import pytest
import torch
from btx_merge.modeling import BTXForCausalLM, BTXForSequenceClassification, BTXForTokenClassification
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from btx_merge.lora import TARGETS, lora_config
from tests.modeling.test_peft import (
    ALPHA,
    ATTENTION,
    RANK,
    adapted,
    base,
    by_hand,
    every_implementation,
    every_part,
    logits,
    lora_names,
    pytestmark,  # noqa: F401  the same warnings are not ours
    randomise,
    trainable,
)
from tests.support import warm
from tests.support.common import problems_of, tensors_of
from tests.support.models import EXPERTS, tokens

# --- saving, loading, merging ------------------------------------------------------------------------------------


@every_part
@every_implementation
def test_an_adapter_survives_saving_and_loading(train, implementation, tmp_path):
    model = adapted(train, implementation)
    model.save_pretrained(tmp_path)
    assert tensors_of(tmp_path).keys() == lora_names(train, adapter="")
    loaded = PeftModel.from_pretrained(base(implementation), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert trainable(loaded) == set()
    assert trainable(PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)) == lora_names(train)


@every_part
@every_implementation
@pytest.mark.parametrize("safe", [False, True])
def test_merged_into_the_weights_it_is_a_plain_checkpoint(train, implementation, safe, tmp_path):
    model = adapted(train, implementation)
    weights, _ = by_hand(model)
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged) is BTXForCausalLM
    torch.testing.assert_close(logits(merged), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), weights[name].detach(), atol=1e-6, rtol=1e-6)

    merged.save_pretrained(tmp_path / "merged")
    base(implementation).save_pretrained(tmp_path / "base")
    names = tensors_of(tmp_path / "base").keys()
    assert tensors_of(tmp_path / "merged").keys() == names == weights.keys()
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("merged", "base")]
    assert configs[0] == configs[1]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    loaded.set_experts_implementation(implementation)
    assert torch.equal(logits(loaded), logits(merged))


@every_part
def test_without_its_adapter_it_is_the_base_bit_for_bit(train):
    model, expected = adapted(train), logits(base())
    with_adapter = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), with_adapter)
    assert torch.equal(logits(model.unload()), expected)


PAIRS = [
    ("routers", "routers"),
    ("routers", "routers + shared"),
    ("routers", "experts"),
    ("experts", "routers + shared"),
    ("experts", "experts"),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_several_adapters(first, second, tmp_path):
    """Each alone as if the other were not there; both at once; none; both merged."""
    model = adapted(first)
    alone = logits(model)
    other = adapted(second)
    randomise(other, seed=8)
    other.save_pretrained(tmp_path)
    expected = logits(other)
    model.load_adapter(tmp_path, adapter_name="other")
    assert torch.equal(logits(model), alone)
    model.set_adapter("other")
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert min((both - one).abs().max() for one in (alone, expected)) > 0.1
    merged = model.merge_and_unload(adapter_names=["default", "other"])
    torch.testing.assert_close(logits(merged), both, atol=1e-5 * both.abs().max().item(), rtol=0)


@every_part
def test_the_auto_classes_find_base_and_adapter(train, tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wrapped = get_peft_model(model, lora_config(train, model, r=RANK, lora_alpha=ALPHA))
    randomise(wrapped)
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    by_peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(by_peft.get_base_model()) is BTXForCausalLM
    assert torch.equal(logits(by_peft), expected)
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(by_transformers), expected)
    prompt = {"input_ids": tokens(), "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(by_peft.generate(**prompt), wrapped.merge_and_unload().generate(**prompt))


def test_the_auto_classes_in_a_fresh_process(tmp_path):
    """`import btx_merge` is enough: neither the model code nor `trust_remote_code` is named."""
    base().save_pretrained(tmp_path / "base")
    model = adapted("routers + shared")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    torch.save((tokens(), logits(model)), tmp_path / "expected.pt")
    script = """
import btx_merge, torch
from peft import AutoPeftModelForCausalLM
ids, expected = torch.load("expected.pt")
model = AutoPeftModelForCausalLM.from_pretrained("adapter").eval()
print(type(model.get_base_model()).__module__, torch.equal(model(ids).logits, expected))
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = warm.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, level="transformers")
    assert done.stdout == "btx_merge.modeling.modeling_btx True\n", done.stderr


@every_part
@pytest.mark.parametrize("head", [BTXForSequenceClassification, BTXForTokenClassification])
def test_the_head_of_a_classifier_is_trained_and_saved(train, head, tmp_path):
    def classifier(seed: int) -> Any:
        language_model = base(pad_token_id=0, num_labels=3)
        torch.manual_seed(seed)
        model = head(language_model.config)
        model.model.load_state_dict(language_model.model.state_dict())
        return model

    model = classifier(0)
    wrapped = get_peft_model(model, lora_config(train, model, r=RANK))
    randomise(wrapped)
    heads = {name for name in trainable(wrapped) if ".score." in name}
    assert heads
    assert trainable(wrapped) == lora_names(train) | heads
    labels = tokens() % 3 if head is BTXForTokenClassification else torch.tensor([0, 2])
    wrapped.train()(input_ids=tokens(), labels=labels).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in wrapped.parameters() if parameter.requires_grad)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(1), tmp_path)
    assert torch.equal(logits(loaded), logits(wrapped))


@pytest.mark.parametrize("variant", ["use_dora", "use_rslora"])
def test_variants_of_lora(variant, tmp_path):
    model = adapted("routers + shared", **{variant: True})
    expected = logits(model)
    assert (expected - logits(adapted("routers + shared"))).abs().max() > 0.1
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(loaded), expected)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, atol=2e-5, rtol=0)


# --- refusals, and a warning -------------------------------------------------------------------------------------


refused = partial(problems_of, lora_config)


def test_all_that_is_wrong_is_said_at_once():
    assert refused("router", LoraConfig(), r=0) == [
        "lora_config: train: 'router'; expected one of 'routers', 'routers + shared', 'experts'",
        "lora_config: model: a LoraConfig; expected a BTXForCausalLM, or its config",
        "lora_config: r: 0; expected an integer of at least 1",
    ]
    assert list(TARGETS) == ["routers", "routers + shared", "experts"]


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, None])
def test_bad_ranks(rank):
    assert refused("routers", base().config, r=rank) == [f"lora_config: r: {rank}; expected an integer of at least 1"]


@pytest.mark.parametrize("name", ["target_modules", "target_parameters", "rank_pattern", "alpha_pattern"])
def test_what_train_decides_is_not_an_option(name):
    (line,) = refused("routers", base(), **{name: ["q_proj"]})
    assert line.startswith(f"lora_config: {name}: is decided by train. Set it on the LoraConfig that comes back")


@pytest.mark.parametrize(
    ("option", "value", "what_peft_does"),
    [
        ("lora_dropout", 0.1, "ValueError"),
        ("use_dora", True, "ValueError"),
        ("lora_bias", True, "ValueError"),
        ("init_lora_weights", "pissa", "AttributeError"),
        ("init_lora_weights", "orthogonal", "AttributeError"),
        ("init_lora_weights", "eva", "nothing"),
        ("layers_to_transform", [0], "nothing"),
        ("exclude_modules", r".*\.0\..*", "nothing"),
        ("use_qalora", True, "nothing"),
    ],
)
def test_options_that_peft_does_not_apply_to_fused_experts(option, value, what_peft_does):
    """peft on its own stops later, or trains what was not asked for. Where it has learned to, allow it here."""
    (line,) = refused("experts", base(), **{option: value})
    assert line.startswith(f"lora_config: {option}: {value!r}, which peft {peft.__version__} does not apply to fused")
    config = lora_config("experts", base())
    config = LoraConfig(**{**TARGETS["experts"], "r": config.r, option: value})
    if what_peft_does == "nothing":
        assert trainable(get_peft_model(base(), config)) == lora_names("experts")
    else:
        with pytest.raises(Exception, match=r".") as caught:
            get_peft_model(base(), config)
        assert type(caught.value).__name__ == what_peft_does
    lora_config("routers + shared", base(), **{option: value})


def test_defaults_of_peft_are_no_options():
    expected = lora_config("experts", base())
    given = lora_config("experts", base(), lora_dropout=0.0, use_dora=False, bias="none", layers_to_transform=None)
    assert given == expected


def test_a_selection_bias_is_not_part_of_an_adapter(tmp_path):
    model = base(router_selection_bias=True)
    with pytest.warns(UserWarning, match="does not hold the routers' selection bias"):
        config = lora_config("routers", model)
    wrapped = get_peft_model(model, config)
    wrapped.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    model.update_router_bias(0.1)
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(router_selection_bias=True), tmp_path / "adapter")
    assert not torch.equal(logits(loaded), expected)  # so the warning is needed
    wrapped.merge_and_unload().save_pretrained(tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(whole), expected, atol=1e-5, rtol=1e-5)


def test_an_option_that_peft_does_not_know():
    with pytest.raises(TypeError, match="rnak"):
        lora_config("routers", base(), rnak=4)


def test_biases_are_saved_with_the_lora(tmp_path):
    model = base(attention_bias=True)
    wrapped = get_peft_model(model, lora_config("routers + shared", model, bias="lora_only"))
    biases = {name for name in trainable(wrapped) if name.endswith("bias")}
    assert len(biases) == 2 * len(ATTENTION)
    with torch.no_grad():
        for name in biases:
            wrapped.get_parameter(name).add_(1)
    wrapped.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(attention_bias=True), tmp_path)), logits(wrapped))


def test_the_shapes_in_an_adapter_of_experts(tmp_path):
    adapted("experts").save_pretrained(tmp_path)
    prefix = "base_model.model.model.layers.0.mlp.experts."
    shapes = {name.removeprefix(prefix): list(tensor.shape) for name, tensor in tensors_of(tmp_path).items()}
    expected = {
        "base_layer.lora_A.weight": [EXPERTS * RANK, 32],  # gate_up_proj: [E r, H] and [2I, r E]
        "base_layer.lora_B.weight": [48, EXPERTS * RANK],
        "lora_A.weight": [EXPERTS * RANK, 24],  # down_proj: [E r, I] and [H, r E]
        "lora_B.weight": [32, EXPERTS * RANK],
    }
    assert {name: shape for name, shape in shapes.items() if "layers" not in name} == expected
