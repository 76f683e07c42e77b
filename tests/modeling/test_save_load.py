"""Saving, loading, resizing and placing a model as every model of transformers can be.

Loading as remote code, without this package, is in test_auto_classes.py; checkpoints that `merge` wrote are in
test_merge.py. V is the vocabulary's size, H the hidden one.
"""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, infer_auto_device_map
from btx_merge.modeling import BTXForCausalLM, BTXModel
from safetensors.torch import load_file, save_file

from tests.support.common import tensors_of
from tests.support.models import tiny_btx, tokens

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    """The logits of a language model, the last hidden state of a bare decoder."""
    return model(tokens())[0]


def assert_same_model(ours: Any, expected: Any) -> None:
    state, target = ours.state_dict(), expected.state_dict()
    assert list(state) == list(target)
    assert all(torch.equal(state[name], target[name]) for name in target)
    assert torch.equal(outputs(ours), outputs(expected))


# --- saved and loaded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", [True, False])
def test_saved_and_loaded_twice(tmp_path, head, tied):
    model = tiny_btx(tie_word_embeddings=tied)
    model = model if head else model.model
    again = model
    for number in range(2):
        folder = tmp_path / str(number)
        again.save_pretrained(folder)
        assert (folder / "generation_config.json").exists() == head
        again, info = type(model).from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert all(parameter.is_contiguous() for parameter in again.parameters())
        assert not again.training
        assert_same_model(again, model)
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in "01")
    assert first == second
    assert (tmp_path / "0" / "modeling_btx.py").read_text() == (tmp_path / "1" / "modeling_btx.py").read_text()


@pytest.mark.parametrize("tied", [False, True])
def test_shards(tmp_path, tied):
    model = tiny_btx(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert set(index["weight_map"]) == set(tensors_of(tmp_path))
    assert set(model.state_dict()) - set(index["weight_map"]) == ({"lm_head.weight"} if tied else set())
    assert_same_model(BTXForCausalLM.from_pretrained(tmp_path), model)


def test_a_state_dict_without_a_folder():
    model = tiny_btx()
    again = BTXForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_same_model(again, model)


@pytest.mark.parametrize("tied", [False, True])
def test_torch_files_pickles_and_copies(tmp_path, tied):
    model = tiny_btx(tie_word_embeddings=tied)
    model.config.save_pretrained(tmp_path)
    weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight" or not tied}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    copies = [
        BTXForCausalLM.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
    ]
    for again in copies:
        assert_same_model(again, model)
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_saved_in_another_folder_layout(tmp_path):
    """A variant beside the plain file, and a subfolder."""
    model = tiny_btx()
    model.save_pretrained(tmp_path / "sub", variant="other")
    assert list((tmp_path / "sub").glob("*.safetensors")) == [tmp_path / "sub" / "model.other.safetensors"]
    assert_same_model(BTXForCausalLM.from_pretrained(tmp_path, subfolder="sub", variant="other"), model)


# --- the decoder in a checkpoint of the whole, and the other way round -----------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_from_a_language_model_and_back(tmp_path, tied):
    model = tiny_btx(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "whole")
    decoder, info = BTXModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) <= {"lm_head.weight"}
    assert_same_model(decoder, model.model)
    decoder.save_pretrained(tmp_path / "decoder")
    again, info = BTXForCausalLM.from_pretrained(tmp_path / "decoder", output_loading_info=True)
    assert set(info["missing_keys"]) == (set() if tied else {"lm_head.weight"})
    assert_same_model(again.model, decoder)
    if tied:
        assert_same_model(again, model)


# --- tying -----------------------------------------------------------------------------------------------------


def test_a_tied_head_is_the_embedding_after_loading_and_training(tmp_path):
    tiny_btx(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in tensors_of(tmp_path)
    model = BTXForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.train()(tokens(), labels=tokens()).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval()
    torch.testing.assert_close(model.lm_head.weight, model.model.embed_tokens.weight, atol=0, rtol=0)
    model.save_pretrained(tmp_path / "trained")
    assert_same_model(BTXForCausalLM.from_pretrained(tmp_path / "trained"), model)


def test_an_untied_checkpoint_keeps_its_head(tmp_path):
    model = tiny_btx()
    model.save_pretrained(tmp_path)
    again = BTXForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    again.post_init()
    assert_same_model(again, model)


# --- what a checkpoint lacks or has too much of ----------------------------------------------------------------


def without(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        EXPERTS,
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_told_and_initialised(tmp_path, name):
    model = tiny_btx(initializer_range=0.02)
    model.save_pretrained(tmp_path)
    without(tmp_path, name)
    again, info = BTXForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {name}
    for other, value in again.state_dict().items():
        assert other == name or torch.equal(value, model.state_dict()[other])
    new = again.state_dict()[name]
    if name == "model.norm.weight":
        assert (new == 1).all()
    else:  # 20 standard errors of the smallest tensor's deviation
        assert new.std().item() == pytest.approx(0.02, rel=0.5)
        assert not torch.equal(new, model.state_dict()[name])


def test_nothing_is_left_uninitialised_on_the_way_from_meta():
    """Loading an empty checkpoint initialises everything as the constructor does; so does `init_weights`."""
    config = tiny_btx(initializer_range=0.02, hidden_size=64, intermediate_size=128).config
    expected = BTXForCausalLM(copy.deepcopy(config))
    loaded = BTXForCausalLM.from_pretrained(None, config=copy.deepcopy(config), state_dict={})
    with torch.device("meta"):
        moved = BTXForCausalLM(copy.deepcopy(config))
    assert {value.device.type for value in (*moved.parameters(), *moved.buffers())} == {"meta"}
    moved.to_empty(device="cpu")
    with torch.no_grad():
        for value in (*moved.parameters(), *moved.buffers()):
            value.fill_(torch.nan)
    moved.init_weights()
    for model in (expected, loaded, moved):
        buffers = dict(expected.named_buffers())
        assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
        for name, parameter in model.named_parameters():
            if "norm" in name:
                assert (parameter == 1).all()
            else:
                assert parameter.std().item() == pytest.approx(0.02, rel=0.25), name
        assert torch.isfinite(outputs(model)).all()  # no tensor outside parameters and buffers stayed behind


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"vocab_size": 30}, {"model.embed_tokens.weight", "lm_head.weight"}),
        (
            {"num_local_experts": 3},
            {
                f"model.layers.{n}.mlp.{kind}"
                for n in (0, 1)
                for kind in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
            },
        ),
    ],
)
def test_other_shapes_are_refused_unless_one_asks_for_them(tmp_path, change, names):
    model = tiny_btx(initializer_range=0.02)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        BTXForCausalLM.from_pretrained(tmp_path, **change)
    again, info = BTXForCausalLM.from_pretrained(
        tmp_path, **change, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in info["mismatched_keys"]} == names
    for name, value in again.state_dict().items():
        if name in names:
            assert value.std().item() == pytest.approx(0.02, rel=0.5)
        else:
            assert torch.equal(value, model.state_dict()[name])
    with torch.no_grad():
        assert torch.isfinite(again(tokens() % 30).logits).all()


# --- dtypes and devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, saved):
    tiny_btx().to(saved).save_pretrained(tmp_path)
    for asked, expected in (
        ({}, saved),
        ({"dtype": "auto"}, saved),
        ({"dtype": torch.float32}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": torch.float16}, torch.float16),
    ):
        model = BTXForCausalLM.from_pretrained(tmp_path, **asked)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert model.dtype == model.config.dtype == expected
        assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}  # of the rotary embedding
        assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    "options",
    [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}],
    ids=str,
)
def test_places_to_load_to(tmp_path, options):
    model = tiny_btx()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    if not torch.cuda.is_available() or options["device_map"] != "auto":
        assert_same_model(BTXForCausalLM.from_pretrained(tmp_path, **options), model)
    with torch.device("cpu"):
        assert_same_model(BTXForCausalLM.from_pretrained(tmp_path), model)
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta device"):
        BTXForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_offloaded(tmp_path, place, tied):
    """Weights come from the disk, or from the host's memory, when a layer runs."""
    model = tiny_btx(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    if place == "disk":
        places = dict.fromkeys(
            ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
        )
        places["model.layers.1"] = "disk"
        again = BTXForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
        )
        assert again.model.layers[1].mlp.experts.down_proj.device.type == "meta"
    else:
        again = cpu_offload(BTXForCausalLM.from_pretrained(tmp_path / "model"), "cpu")
        assert {parameter.device.type for parameter in again.parameters()} == {"meta"}
    assert torch.equal(outputs(again), outputs(model))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(tokens(), **options), model.generate(tokens(), **options))
    if place == "disk":
        again.save_pretrained(tmp_path / "again")
        assert_same_model(BTXForCausalLM.from_pretrained(tmp_path / "again"), model)


def test_a_layer_is_never_split_between_devices():
    model = tiny_btx(num_hidden_layers=4)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    memory = {0: int(3.5 * layer), "cpu": 10**9}
    places = infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
    assert set(places.values()) == {0, "cpu"}
    assert all(name.count(".") <= 2 for name in places)


# --- embeddings ------------------------------------------------------------------------------------------------


def test_embeddings_can_be_asked_for_and_replaced():
    model = tiny_btx()
    for part in (model, model.model):
        assert part.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    assert model.model.get_output_embeddings() is None
    embedding, head = torch.nn.Embedding(61, 32), torch.nn.Linear(32, 61, bias=False)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.model.embed_tokens is embedding
    assert model.lm_head is head


SIZES = [(71, None, 71), (50, None, 50), (61, 32, 64), (None, None, 61)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("size", "multiple", "expected"), SIZES)
def test_resized_embeddings(tmp_path, size, multiple, expected, tied):
    """Tokens that stay have the logits they had, in the model and in what it saves."""
    model = tiny_btx(tie_word_embeddings=tied)
    ids = tokens() % 50
    with torch.no_grad():
        before = model(ids).logits
    embedding = model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
    assert embedding is model.get_input_embeddings()
    assert (model.lm_head.weight is embedding.weight) == tied
    assert model.lm_head.weight.shape == embedding.weight.shape == (expected, 32)
    assert {model.config.vocab_size, model.vocab_size, embedding.num_embeddings} == {expected}
    kept = min(61, expected)
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.logits[..., :kept], before[..., :kept], atol=1e-6, rtol=0)
    out.loss.backward()
    assert model.lm_head.weight.grad.shape == (expected, 32)
    assert torch.isfinite(model(torch.full((1, 3), expected - 1)).logits).all()  # a new token, where there is one
    model.save_pretrained(tmp_path)
    again = BTXForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, out.logits)


def test_a_bare_decoder_is_resized_too():
    decoder = tiny_btx().model
    before = outputs(decoder)
    decoder.resize_token_embeddings(70)
    assert decoder.embed_tokens.weight.shape == (70, 32)
    assert torch.equal(outputs(decoder), before)
