"""Adapters as experts, held against what peft itself makes of them."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from btx_merge import InputError, MergeRecipe, NonFiniteError, check, extract, merge
from btx_merge.checkpoints.dtypes import from_float32
from btx_merge.sources.adapters.lora_delta import is_plain_lora
from btx_merge.sources.opening import open_each
from btx_merge.sources.source import SEED, ExpertSpec, Source
from tests.support.common import (
    edit_json,
    load_float32,
    logits_of,
    move_trainable,
    problems_of,
    save_seed,
    tensors_of,
    tiny_tokenizer,
)

# What peft and transformers say to who trains is not about us.
pytestmark = [pytest.mark.filterwarnings("ignore:::peft"), pytest.mark.filterwarnings("ignore:::transformers")]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def bases(root: Path) -> Callable[..., Path]:
    """Seeds of several shapes, each made once."""

    @functools.cache
    def make(dtype: torch.dtype = torch.float32, tied: bool = False, biased: bool = False) -> Path:
        name = f"{str(dtype)[6:]}-{'tied' if tied else 'untied'}{'-biased' if biased else ''}"
        folder = save_seed(root / name, dtype=dtype, tie_word_embeddings=tied, attention_bias=biased)
        if biased:  # transformers starts biases at 0, where a lost one would not be seen
            tensors = tensors_of(folder)
            noisy = {name: t + 0.1 * torch.randn(t.shape) if "bias" in name else t for name, t in tensors.items()}
            save_file(noisy, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return bases(tmp_path_factory.mktemp("bases"))


def load(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype="auto")


def train(base: Path, folder: Path, config: Any, added: tuple[str, ...] = ()) -> Path:
    """An adapter all of whose trainable numbers are random, as peft saves it."""
    model = load(base)
    if added:
        model.resize_token_embeddings(model.config.vocab_size + len(added))
    torch.manual_seed(1)
    adapted = get_peft_model(model, config)
    move_trainable(adapted)
    adapted.save_pretrained(folder)
    if added:
        tiny_tokenizer(list(added)).save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path, rows: int = 128) -> dict[str, torch.Tensor]:
    """The reference: every tensor of the model after merge_and_unload."""
    model = load(base)
    if rows != model.config.vocab_size:
        model.resize_token_embeddings(rows)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in merged.state_dict().items()}


def open_adapter(seed: Path, adapter: Path, scratch: Path | None = None, **spec: Any) -> Source:
    """The adapter as an expert of a merge; peft may be needed only where `scratch` is given."""

    def make() -> Path:
        assert scratch is not None, "this adapter should not need peft"
        scratch.mkdir(parents=True)
        return scratch

    specs = {SEED: ExpertSpec(str(seed)), "expert": ExpertSpec(str(adapter), **spec)}
    sources, problems = open_each(specs, None, make)
    if problems:
        raise InputError(problems)
    return sources["expert"]


def rows_of(source: Source, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(source.rows(name, 0, tensor.shape[0])).reshape(tensor.shape)
        for name, tensor in expected.items()
    }


def assert_equal_in_float32(source: Source, expected: dict[str, torch.Tensor], changed: int) -> None:
    """Equal but for the order of summation: at most rank + 2 = 18 roundings, each by 2^-25 of the largest value."""
    stored = {source.stored_name(name) for name in expected}
    assert stored == set(source.tensors) - {"lm_head.weight"} | ({"lm_head.weight"} & stored)
    found = rows_of(source, expected)
    for name, tensor in expected.items():
        atol = 18 * 2.0**-25 * max(1.0, float(tensor.abs().max()))
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert source.base is not None
    original = tensors_of(source.base.folder)
    differing = [
        name
        for name, tensor in expected.items()
        if name in original and (tensor.shape != original[name].shape or not torch.equal(tensor, original[name]))
    ]
    assert len(differing) == changed, differing  # so that a delta that is nothing would be seen


PLAIN: dict[str, tuple[dict[str, Any], int]] = {  # LoRA options, tensors of the untied base that they change
    "attention": ({"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16}, 4),
    "all linear": ({"target_modules": "all-linear", "r": 4, "lora_alpha": 3}, 14),
    "rank above alpha": ({"target_modules": LINEAR, "r": 16, "lora_alpha": 1}, 14),
    "rsLoRA": ({"target_modules": LINEAR, "r": 9, "lora_alpha": 2, "use_rslora": True}, 14),
    "gaussian": ({"target_modules": ATTENTION, "r": 4, "init_lora_weights": "gaussian"}, 8),
    "dropout": ({"target_modules": ATTENTION, "r": 4, "lora_dropout": 0.5}, 8),
    "one layer": ({"target_modules": ATTENTION, "r": 4, "layers_to_transform": [1], "layers_pattern": "layers"}, 4),
    "regular expression": ({"target_modules": r".*\.0\..*(q|k)_proj", "r": 4}, 2),
    "excluded": ({"target_modules": ATTENTION, "exclude_modules": r".*\.0\..*", "r": 4}, 4),
    "rank and alpha patterns": (
        {
            "target_modules": LINEAR,
            "r": 4,
            "lora_alpha": 2,
            "rank_pattern": {"q_proj": 2, r"model.layers.1.mlp.down_proj": 7, "o_proj": 3},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 5, "q_proj": 9, r".*mlp\.(up|down)_proj": 11, "proj": 99},
        },
        14,
    ),
    "anchored patterns": (
        {
            "target_modules": ATTENTION,
            "rank_pattern": {"^model.layers.0.self_attn.k_proj": 2},
            "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 20, "self_attn.k_proj": 3},
        },
        8,
    ),
    "patterns and rsLoRA": (
        {
            "target_modules": ATTENTION,
            "use_rslora": True,
            "rank_pattern": {"v_proj": 5},
            "alpha_pattern": {"v_proj": 6},
        },
        8,
    ),
    "embedding": ({"target_modules": ["embed_tokens"], "r": 4}, 1),
    "embedding and head": ({"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 4}, 4),
    "embedding and rsLoRA": ({"target_modules": ["embed_tokens"], "r": 5, "use_rslora": True}, 1),
    "saved head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 4}, 3),
    "saved embedding": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "r": 4}, 4),
    "saved norms": ({"target_modules": ["q_proj"], "modules_to_save": ["norm"], "r": 4}, 7),
    "saved projection": ({"target_modules": ["q_proj"], "modules_to_save": ["down_proj"], "r": 4}, 4),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_lora_in_float32(kind: str, base_of: Callable[..., Path], tmp_path: Path) -> None:
    options, changed = PLAIN[kind]
    base = base_of()
    adapter = train(base, tmp_path / "adapter", LoraConfig(task_type="CAUSAL_LM", **options))
    assert is_plain_lora(json.loads((adapter / "adapter_config.json").read_text()))
    assert_equal_in_float32(open_adapter(base, adapter), merged_by_peft(base, adapter), changed)


@pytest.mark.parametrize("kind", ["all linear"])
def test_plain_lora_on_a_tied_base(kind: str, base_of: Callable[..., Path], tmp_path: Path) -> None:
    """What changes the embedding changes the head with it."""
    base = base_of(tied=True)
    options, changed = PLAIN[kind]
    adapter = train(base, tmp_path / "adapter", LoraConfig(task_type="CAUSAL_LM", **options))
    expected = merged_by_peft(base, adapter)
    assert torch.equal(expected["lm_head.weight"], expected["model.embed_tokens.weight"])
    assert_equal_in_float32(open_adapter(base, adapter), expected, changed)


@pytest.mark.parametrize(("bias", "changed"), [("none", 4), ("lora_only", 8), ("all", 12)])
def test_trained_biases(bias: str, changed: int, base_of: Callable[..., Path], tmp_path: Path) -> None:
    """lora_only: those of the modules that have a LoRA; all: those of k_proj and o_proj too."""
    base = base_of(biased=True)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4, bias=bias)
    adapter = train(base, tmp_path / "adapter", config)
    assert_equal_in_float32(open_adapter(base, adapter), merged_by_peft(base, adapter), changed)


GROWN: dict[str, tuple[bool, dict[str, Any], int]] = {  # whether the base is tied, LoRA options, changed tensors
    "modules_to_save": (False, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, 4),
    "embedding saved": (False, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, 4),
    "resized": (False, {"target_modules": ["q_proj"]}, 4),  # then peft saves embedding and head untrained
    "LoRA on them": (False, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, 4),
    "tied, resized": (True, {"target_modules": ["q_proj"]}, 3),
    "DoRA": (False, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "use_dora": True}, 4),
    "DoRA on them": (False, {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True}, 4),
    "tied together": (
        True,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        3,
    ),
}


@pytest.mark.parametrize("kind", GROWN)
def test_grown_vocabulary(kind: str, base_of: Callable[..., Path], tmp_path: Path) -> None:
    tied, options, changed = GROWN[kind]
    base = base_of(tied=tied)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **options)
    adapter = train(base, tmp_path / "adapter", config, added=("<|a|>", "<|b|>"))
    source = open_adapter(base, adapter, tmp_path / "scratch")
    assert source.config["vocab_size"] == 130
    assert source.tokenizer_folder == adapter
    expected = merged_by_peft(base, adapter, rows=130)
    assert expected["model.embed_tokens.weight"].shape == (130, 64)
    assert expected["lm_head.weight"].shape == (130, 64)
    assert_equal_in_float32(source, expected, changed)
    merge(MergeRecipe(str(base), {"expert": str(adapter)}), tmp_path / "out")
    merged = tensors_of(tmp_path / "out")["model.embed_tokens.weight"]
    seed = tensors_of(base)["model.embed_tokens.weight"]
    torch.testing.assert_close(merged[:128], (seed + expected["model.embed_tokens.weight"][:128]) / 2)
    torch.testing.assert_close(merged[128:], expected["model.embed_tokens.weight"][128:])


def test_adapter_model_bin(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of()
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=LINEAR, modules_to_save=["lm_head"], r=4)
    adapter = train(base, tmp_path / "adapter", config)
    expected = merged_by_peft(base, adapter)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert_equal_in_float32(open_adapter(base, adapter), expected, 15)


HALF = {torch.bfloat16: ("BF16", 2.0**-7, 0.0), torch.float16: ("F16", 2.0**-10, 2.0**-24)}
"""Their names; the step between neighbours, relative to the smaller; the step between subnormal numbers."""


def rounded_rows(source: Source, name: str, rows: int, dtype: torch.dtype) -> torch.Tensor:
    raw = from_float32(source.rows(name, 0, rows), HALF[dtype][0])
    return torch.from_numpy(raw.copy()).view(dtype).reshape(rows, -1)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_half_precision_within_its_rounding(
    dtype: torch.dtype, factors: torch.dtype, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Both sides round one float32 sum, in which the last bits may differ: never more than to the next number."""
    base = base_of(dtype=dtype)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=LINEAR, r=8, lora_alpha=5)
    adapter = train(base, tmp_path / "adapter", config)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: w.to(factors) for name, w in weights.items()}, adapter / "adapter_model.safetensors")
    source = open_adapter(base, adapter)
    _, step, tiny = HALF[dtype]
    equal = total = 0
    for name, tensor in merged_by_peft(base, adapter).items():
        assert tensor.dtype == dtype
        found = rounded_rows(source, name, tensor.shape[0], dtype).reshape(tensor.shape)
        assert ((found.float() - tensor.float()).abs() <= step * tensor.float().abs() + tiny).all(), name
        equal += int((found == tensor).sum())
        total += tensor.numel()
    assert equal > 0.999 * total


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_of_an_embedding(dtype: torch.dtype, base_of: Callable[..., Path], tmp_path: Path) -> None:
    """Here peft holds the factors in the model's dtype and rounds the delta before it adds it. We round once."""
    base = base_of(dtype=dtype)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"], r=8, lora_alpha=5)
    adapter = train(base, tmp_path / "adapter", config)
    name = "model.embed_tokens.weight"
    by_peft = merged_by_peft(base, adapter)[name]
    found = rounded_rows(open_adapter(base, adapter), name, 128, dtype)
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.model.embed_tokens.lora_embedding_{letter}"].float() for letter in "AB")
    exact = tensors_of(base)[name].float() + 5 / 8 * (b @ a).T
    half_step = HALF[dtype][1] / 2
    once = 1.01 * half_step * exact.abs() + HALF[dtype][2]
    assert ((found.float() - exact).abs() <= once).all()
    bound = 4 * half_step * (exact.abs() + 5 / 8 * (b.abs() @ a.abs()).T)
    assert ((found.float() - by_peft.float()).abs() <= bound).all()


# What goes through peft


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "LOHA"},
        {},
        {"peft_type": "LORA", "use_dora": True},
        {"peft_type": "LORA", "init_lora_weights": "olora"},
        {"peft_type": "LORA", "lora_bias": True},
        {"peft_type": "LORA", "layer_replication": [[0, 2], [1, 2]]},
        {"peft_type": "LORA", "a_key_of_the_future": "x"},
    ],
)
def test_only_what_is_known_to_be_plain_is_computed_here(config: dict[str, Any]) -> None:
    assert not is_plain_lora(config)
    assert is_plain_lora({"peft_type": "LORA", "use_dora": False, "a_key_of_the_future": None})


THROUGH_PEFT: dict[str, Any] = {
    "DoRA": LoraConfig(task_type="CAUSAL_LM", target_modules=LINEAR, r=4, use_dora=True),
    "PiSSA": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, init_lora_weights="pissa"),
    "tokens": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, trainable_token_indices=[5, 7]),
    "parameters": LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, target_parameters=["mlp.up_proj.weight"]
    ),
    "IA3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], r=4),
    "VeRA": VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, projection_prng_key=3),
}


@pytest.mark.parametrize("kind", THROUGH_PEFT)
def test_other_adapters_are_merged_by_peft(kind: str, base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of()
    adapter = train(base, tmp_path / "adapter", THROUGH_PEFT[kind])
    assert not is_plain_lora(json.loads((adapter / "adapter_config.json").read_text()))
    expected = merged_by_peft(base, adapter)
    source = open_adapter(base, adapter, tmp_path / "scratch")
    found = rows_of(source, expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    original = tensors_of(base)
    assert any(not torch.equal(tensor, original[name]) for name, tensor in expected.items())
    assert source.located.public_name == "adapter"
    assert source.base is not None
    assert source.base.public_name == "float32-untied"
    assert source.tokenizer_folder == base


def test_what_peft_merged_is_removed_again(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of()
    adapter = train(base, tmp_path / "adapter", THROUGH_PEFT["DoRA"])
    expected = merged_by_peft(base, adapter)
    merge(MergeRecipe(str(base), {"expert": str(adapter)}), tmp_path / "room" / "out")
    assert [path.name for path in (tmp_path / "room").iterdir()] == ["out"]
    down = tensors_of(tmp_path / "room" / "out")["model.layers.0.mlp.experts.down_proj"]
    assert torch.equal(down[1], expected["model.layers.0.mlp.down_proj.weight"])


@pytest.mark.parametrize("kind", ["prompt tuning", "nonsense", "adapter with another shape", "a part missing"])
def test_what_peft_cannot_merge_is_refused(kind: str, base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of()
    if kind == "prompt tuning":
        adapter = train(base, tmp_path / "adapter", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    else:
        adapter = train(base, tmp_path / "adapter", THROUGH_PEFT["DoRA"])
        if kind == "nonsense":
            edit_json(adapter / "adapter_config.json", peft_type="NONSENSE")
        elif kind == "a part missing":
            tensors = load_file(adapter / "adapter_model.safetensors")
            del tensors["base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"]
            save_file(tensors, adapter / "adapter_model.safetensors")
        else:
            edit_json(adapter / "adapter_config.json", r=5)
    with pytest.raises(InputError) as caught:
        check(MergeRecipe(str(base), {"expert": str(adapter)}))
    (problem,) = caught.value.problems
    line = str(problem)
    said = {
        "prompt tuning": "adapter_config.json: an adapter of type PROMPT_TUNING, which changes what goes through",
        "nonsense": "adapter_config.json: peft_type is 'NONSENSE', which the installed peft",
        "adapter with another shape": "adapter_config.json: peft cannot merge an adapter of type LORA here (",
        "a part missing": "adapter weights: lacks base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector",
    }
    assert line.startswith(f"expert: {said[kind]}")
    assert "\n" not in line


# Bases


def make_lora(base: Path, folder: Path) -> Path:
    return train(base, folder, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))


@pytest.mark.parametrize("recorded", [None, "", "/home/somebody/models/float32-untied", "org/float32-untied"])
def test_a_recorded_base_that_is_the_seed_by_its_name(
    recorded: str | None, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """The seed was trained on another machine, or downloaded since."""
    base = base_of()
    adapter = make_lora(base, tmp_path / "adapter")
    expected = merged_by_peft(base, adapter)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=recorded)
    assert_equal_in_float32(open_adapter(base, adapter), expected, 2)


def test_an_adapter_on_a_base_that_is_not_the_seed(base_of: Callable[..., Path], tmp_path: Path) -> None:
    """The base is what its config records: a chat model grown from the seed, say."""
    seed = base_of()
    chat = shutil.copytree(seed, tmp_path / "chat-model")
    tensors = {name: tensor * 1.01 for name, tensor in tensors_of(seed).items()}
    save_file(tensors, chat / "model.safetensors", {"format": "pt"})
    adapter = make_lora(chat, tmp_path / "adapter")
    expected = merged_by_peft(chat, adapter)
    source = open_adapter(seed, adapter)
    assert_equal_in_float32(source, expected, 2)
    assert source.base is not None
    assert source.base.folder == chat


def test_a_base_given_in_the_recipe_wins(base_of: Callable[..., Path], tmp_path: Path) -> None:
    seed = base_of()
    moved = tmp_path / "moved"
    save_file({name: t * 1.01 for name, t in tensors_of(seed).items()}, _copy(seed, moved), {"format": "pt"})
    adapter = make_lora(seed, tmp_path / "adapter")
    source = open_adapter(seed, adapter, base=str(moved))
    assert_equal_in_float32(source, merged_by_peft(moved, adapter), 2)


def _copy(seed: Path, folder: Path) -> Path:
    shutil.copytree(seed, folder)
    return folder / "model.safetensors"


def test_a_seed_that_is_an_adapter_itself(base_of: Callable[..., Path], tmp_path: Path) -> None:
    """It is no base for others: their own base is what they record, or nothing."""
    base = base_of()
    seed = make_lora(base, tmp_path / "seed-adapter")
    adapter = train(base, tmp_path / "adapter", LoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj"], r=2))
    assert_equal_in_float32(open_adapter(seed, adapter), merged_by_peft(base, adapter), 2)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    assert refused(seed, adapter) == [
        "adapter_config.json: names no base. Name its base: --base NAME=MODEL (`base:` in the recipe)."
    ]


def refused(seed: Path, adapter: Path, **spec: Any) -> list[str]:
    lines = problems_of(check, MergeRecipe(str(seed), {"expert": {"model": str(adapter), **spec}}))
    assert all(line.startswith("expert: ") for line in lines)
    return [line.removeprefix("expert: ") for line in lines]


def test_a_base_that_is_nowhere(base_of: Callable[..., Path], tmp_path: Path) -> None:
    adapter = make_lora(base_of(), tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="/gone/other")
    assert refused(base_of(), adapter) == [
        "adapter_config.json: the adapter's base /gone/other is not the seed, and cannot be used. If it was trained "
        "on the seed, or another model is meant: name its base: --base NAME=MODEL (`base:` in the recipe).",
        "/gone/other: no such folder; expected a folder with config.json and weights, or a Hub id `org/name` or "
        "`org/name@revision`. Check the path.",
    ]
    assert open_adapter(base_of(), adapter, base=str(base_of())).deltas.keys() == {
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)
    }


def test_a_base_for_a_checkpoint(base_of: Callable[..., Path]) -> None:
    line = "base: given for a checkpoint; expected only for an adapter. Leave `base` out."
    assert refused(base_of(), base_of(), base=str(base_of())) == [line]


def test_a_base_that_lacks_the_module(base_of: Callable[..., Path], tmp_path: Path) -> None:
    """Biases of a base with biases; and a third layer."""
    biased = base_of(biased=True)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, bias="lora_only")
    adapter = train(biased, tmp_path / "adapter", config)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors |= {key.replace("layers.1", "layers.2"): t.clone() for key, t in tensors.items() if "layers.1" in key}
    save_file(tensors, adapter / "adapter_model.safetensors")
    names = [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.2.self_attn.q_proj.bias",
        "model.layers.2.self_attn.q_proj.weight",
    ]
    remedy = "Was it trained on this model? --base NAME=MODEL (`base:` in the recipe) names another."
    assert refused(base_of(), adapter) == [
        f"adapter_model.safetensors: changes {name}, which its base does not have. {remedy}" for name in names
    ]


def test_a_base_of_another_shape(base_of: Callable[..., Path], tmp_path: Path) -> None:
    wide = save_seed(tmp_path / "wide", hidden_size=128)
    adapter = make_lora(wide, tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    assert refused(base_of(), adapter) == [
        f"adapter_model.safetensors: the delta of model.layers.{layer}.self_attn.q_proj.weight is [128, 128]; "
        "expected [64, 64]. Was it trained on this model? --base NAME=MODEL (`base:` in the recipe) names another."
        for layer in range(2)
    ]


APART: dict[str, dict[str, Any]] = {
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "DoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "DoRA on the head": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "PiSSA on the head": {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": "pissa"},
}
TOGETHER: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "LoRA, named by the head": {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 37]},
}


def trained(base: Path, folder: Path, config: Any) -> torch.Tensor:
    """Save an adapter with random weights, and return what the model computes with it before any merge."""
    model = get_peft_model(load(base), config)
    torch.manual_seed(1)
    move_trainable(model)
    model.eval().save_pretrained(folder)
    return logits_of(model)


def alone(base: Path, adapter: Path, room: Path, **recipe: Any) -> torch.Tensor:
    """Merge the adapter as the only expert, take it out again, and return what the dense model computes."""
    options = {"seed_expert": False, "num_experts_per_tok": 1, **recipe}
    merge(MergeRecipe(str(base), {"expert": str(adapter)}, **options), room / "merged")
    extract(room / "merged", "expert", room / "dense")
    return logits_of(load_float32(room / "dense"))


@pytest.mark.parametrize("kind", APART)
def test_embedding_and_head_of_a_tied_base_changed_apart(
    kind: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """What was trained has two matrices: it merges untied, and is refused otherwise."""
    base = base_of(tied=True)
    wanted = trained(base, tmp_path / "adapter", LoraConfig(task_type="CAUSAL_LM", r=4, **APART[kind]))
    (line,) = refused(base, tmp_path / "adapter")
    assert line.startswith("config.json: tie_word_embeddings: False: the adapter changes embedding and head apart")
    assert "--untie" in line
    torch.testing.assert_close(alone(base, tmp_path / "adapter", tmp_path, untie=True), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", TOGETHER)
def test_embedding_and_head_of_a_tied_base_changed_together(
    kind: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of(tied=True)
    wanted = trained(base, tmp_path / "adapter", LoraConfig(task_type="CAUSAL_LM", r=4, **TOGETHER[kind]))
    torch.testing.assert_close(alone(base, tmp_path / "adapter", tmp_path), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_a_file_that_lost_tensors(dora: bool, base_of: Callable[..., Path], tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=4, use_dora=dora)
    file = train(base_of(), tmp_path / "adapter", config) / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if ".layers.0." in key}, file)
    line = refused(base_of(), tmp_path / "adapter")[0]
    assert "lacks" in line
    assert "layers.1.mlp.down_proj" in line
    save_file({}, file)
    (line,) = refused(base_of(), tmp_path / "adapter")
    assert line.startswith("adapter_model.safetensors: holds no tensor at all")


def test_a_recorded_folder_of_the_seeds_name(base_of: Callable[..., Path], tmp_path: Path) -> None:
    """Two runs, two folders of one name: the recorded one is the base."""
    other = shutil.copytree(base_of(), tmp_path / base_of().name)
    moved = {name: tensor * 1.01 for name, tensor in tensors_of(other).items()}
    save_file(moved, other / "model.safetensors", {"format": "pt"})
    source = open_adapter(base_of(), make_lora(other, tmp_path / "adapter"))
    assert source.base is not None
    assert source.base.folder == other
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=f"/gone/{other.name}")
    checked = check(MergeRecipe(str(base_of()), {"expert": str(tmp_path / "adapter")}))
    assert any("is used as its base" in warning.found for warning in checked.warnings)


def test_a_recorded_revision_that_is_not_the_seeds(
    base_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both commits lie in a Hub's cache; the seed is one of them, given as a folder, the adapter's the other."""
    snapshots, one, two = tmp_path / "models--org--tiny" / "snapshots", "a" * 40, "b" * 40
    for commit in (one, two):
        shutil.copytree(base_of(), snapshots / commit)
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "v2").write_text(two)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    adapter = make_lora(base_of(), tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="org/tiny", revision=two)
    source = open_adapter(snapshots / one, adapter)
    assert source.base is not None
    assert (source.base.repo_id, source.base.revision) == ("org/tiny", two)
    elsewhere = f"/home/somebody/hub/models--org--tiny/snapshots/{one}"
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=elsewhere, revision=None)
    source = open_adapter(snapshots / one, adapter)
    assert source.base is not None
    assert source.base.revision == one
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="org/tiny", revision="c" * 40)
    assert "cannot be compared with the seed's" in refused(snapshots / one, adapter)[0]


def test_an_option_that_peft_does_not_know_is_named(base_of: Callable[..., Path], tmp_path: Path) -> None:
    adapter = make_lora(base_of(), tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", use_something_new=True)
    checked = check(MergeRecipe(str(base_of()), {"expert": str(adapter)}))
    (said,) = [warning.found for warning in checked.warnings if "peft warns" in warning.found]
    assert "use_something_new" in said
    assert "pip install -U peft" in said


def test_a_killed_runs_folder_goes(base_of: Callable[..., Path], tmp_path: Path) -> None:
    left = tmp_path / "room" / "btx-scratch-left"
    (left / "files").mkdir(parents=True)
    (left / "in-use.lock").touch()
    adapter = train(base_of(), tmp_path / "adapter", THROUGH_PEFT["DoRA"])
    merge(MergeRecipe(str(base_of()), {"expert": str(adapter)}), tmp_path / "room" / "out")
    assert [path.name for path in (tmp_path / "room").iterdir()] == ["out"]


# Words that lead to the remedy


def test_a_whole_model_in_an_adapters_folder(base_of: Callable[..., Path], tmp_path: Path) -> None:
    """With weights of the adapter there too it is taken, and said; without them one file is in the way."""
    adapter = make_lora(base_of(), tmp_path / "adapter")
    shutil.copy(base_of() / "model.safetensors", adapter)
    checked = check(MergeRecipe(str(base_of()), {"expert": str(adapter)}))
    assert any("a whole model lies there too; the adapter is taken" in warning.found for warning in checked.warnings)
    (adapter / "adapter_model.safetensors").unlink()
    assert refused(base_of(), adapter) == [
        f"{adapter}: no adapter weights, but a whole model; expected adapter_model.safetensors or adapter_model.bin. "
        "If the model is meant, remove adapter_config.json."
    ]


@pytest.mark.parametrize("given", [False, True])
def test_a_base_that_is_an_adapter_itself(given: bool, base_of: Callable[..., Path], tmp_path: Path) -> None:
    first, second = make_lora(base_of(), tmp_path / "first"), make_lora(base_of(), tmp_path / "second")
    edit_json(second / "adapter_config.json", base_model_name_or_path=None if given else str(first))
    *_, line = refused(base_of(), second, **({"base": str(first)} if given else {}))
    assert line == (
        f"{first}: the adapter's base is itself an adapter; expected a whole model. Merge that one into its base "
        "first (peft's merge_and_unload, save_pretrained), and name the result."
    )


def test_an_adapter_in_a_subfolder(base_of: Callable[..., Path], tmp_path: Path) -> None:
    """So peft saves one that has a name."""
    make_lora(base_of(), tmp_path / "named" / "first")
    (line,) = refused(base_of(), tmp_path / "named")
    assert line.startswith(f"{tmp_path / 'named'}: its subfolder first holds an adapter; expected a folder with")
    assert line.endswith(f"Give {tmp_path / 'named' / 'first'}.")


@pytest.mark.parametrize("tied", [False, True])
def test_trained_rows_of_added_tokens(tied: bool, base_of: Callable[..., Path], tmp_path: Path) -> None:
    model = load(base_of(tied=tied))
    model.resize_token_embeddings(130, mean_resizing=False)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, trainable_token_indices=[5, 128, 129])
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    move_trainable(model)
    with torch.no_grad():
        model.eval().save_pretrained(tmp_path / "adapter")
        tiny_tokenizer(["<|a|>", "<|b|>"]).save_pretrained(tmp_path / "adapter")
        recipe = MergeRecipe(
            str(base_of(tied=tied)), {"expert": str(tmp_path / "adapter")}, seed_expert=False, num_experts_per_tok=1
        )
        merge(recipe, tmp_path / "out")
        ids = torch.tensor([[5, 128, 17, 129, 128, 3, 5]])
        wanted, found = model(ids).logits, load_float32(tmp_path / "out")(ids).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_what_peft_merges_is_rounded_once(base_of: Callable[..., Path], tmp_path: Path) -> None:
    """In bfloat16, one LoRA by either way: at most half a step from the sum in float64, and a thousandth."""
    base = base_of(dtype=torch.bfloat16)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=LINEAR, r=4, lora_alpha=8)
    adapter = train(base, tmp_path / "adapter", config)
    edit_json(adapter / "adapter_config.json", use_something_new=True)  # so that peft merges it
    recipe = MergeRecipe(str(base), {"expert": str(adapter)}, seed_expert=False, num_experts_per_tok=1)
    merge(recipe, tmp_path / "out")
    factors, name = load_file(adapter / "adapter_model.safetensors"), "model.layers.0.mlp.down_proj"
    up, down = (factors[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "BA")
    exact = tensors_of(base)[f"{name}.weight"].double() + 2 * up @ down
    found = tensors_of(tmp_path / "out")["model.layers.0.mlp.experts.down_proj"][0]
    assert found.dtype == torch.bfloat16
    step = 2.0 ** (exact.abs().clamp_min(1e-30).log2().floor() - 7)
    assert float(((found.double() - exact).abs() / step).max()) <= 0.5 + 1e-3


def test_a_seed_in_the_hubs_cache_is_known_by_its_commit(base_of: Callable[..., Path], tmp_path: Path) -> None:
    commit = "0123456789" * 4
    seed = shutil.copytree(base_of(), tmp_path / "models--org--tiny" / "snapshots" / commit)
    adapter = make_lora(base_of(), tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="org/tiny")
    merge(MergeRecipe(str(seed), {"expert": str(adapter)}), tmp_path / "out")
    assert f"seed: org/tiny@{commit}" in (tmp_path / "out" / "btx_recipe.yaml").read_text().splitlines()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"[org/tiny](https://huggingface.co/org/tiny) | {commit}" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("kind", ["LoRA", "LoHa"])
def test_a_saved_embedding_without_a_shape(kind: str, base_of: Callable[..., Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 4}
    config = {"LoRA": LoraConfig, "LoHa": LoHaConfig}[kind](**options, modules_to_save=["embed_tokens"])
    file = train(base_of(), tmp_path / "adapter", config) / "adapter_model.safetensors"
    tensors = load_file(file)
    (key,) = [key for key in tensors if "embed_tokens" in key]
    save_file({**tensors, key: torch.tensor(1.0)}, file)
    lines = refused(base_of(), tmp_path / "adapter")
    said = "model.embed_tokens.weight has shape []" if kind == "LoRA" else "of type LOHA here ("
    assert said in lines[0]


# Broken adapters


SAVE_AGAIN = ". Save the adapter again with peft's save_pretrained."


@pytest.fixture
def broken(base_of: Callable[..., Path], tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    adapter = make_lora(base_of(), tmp_path / "adapter")
    return adapter, load_file(adapter / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def test_half_a_pair(broken: tuple[Path, dict[str, torch.Tensor]], base_of: Callable[..., Path]) -> None:
    adapter, tensors = broken
    del tensors[KEY.format("A")]
    tensors[KEY.format("A").replace("layers.0", "layers.1")] = torch.ones(3, 64)
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert refused(base_of(), adapter) == [
        "adapter_model.safetensors: model.layers.0.self_attn.q_proj has lora_B [64, 2]; "
        f"expected lora_A [r, in] and lora_B [out, r]{SAVE_AGAIN}",
        "adapter_model.safetensors: model.layers.1.self_attn.q_proj has lora_A [3, 64], lora_B [64, 2]; "
        f"expected lora_A [r, in] and lora_B [out, r]{SAVE_AGAIN}",
    ]


def test_tensors_that_lora_does_not_have(
    broken: tuple[Path, dict[str, torch.Tensor]], base_of: Callable[..., Path]
) -> None:
    adapter, tensors = broken
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    save_file({**tensors, key: torch.ones(64)}, adapter / "adapter_model.safetensors")
    assert refused(base_of(), adapter) == [
        f"adapter_model.safetensors: tensor {key}, which plain LoRA does not have; "
        f"expected lora_A, lora_B and whole weights{SAVE_AGAIN}"
    ]


def test_factors_of_an_odd_dtype(broken: tuple[Path, dict[str, torch.Tensor]], base_of: Callable[..., Path]) -> None:
    adapter, tensors = broken
    tensors[KEY.format("A")] = tensors[KEY.format("A")].to(torch.int8)
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert refused(base_of(), adapter) == [
        f"adapter_model.safetensors: {KEY.format('A')} has dtype I8; expected one of BF16, F16, F32{SAVE_AGAIN}"
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5; expected a folder or a Hub id"),
        (
            {"lora_alpha": "x"},
            "lora_alpha or alpha_pattern cannot be understood for model.layers.0.self_attn.q_proj (",
        ),
        ({"alpha_pattern": [1]}, "alpha_pattern is '[1]'"),
        ({"alpha_pattern": {"(": 1}}, r"'(.*\\.)?(()' is no regular expression (missing )"),
        ({"rank_pattern": {"a{99999999999}": 1}}, r"'(.*\\.)?(a{99999999999})' is no regular expression ("),
        ({"alpha_pattern": {"(" * 5000: 1}}, r"'(.*\\.)?((((("),
        pytest.param(
            {"alpha_pattern": {"(([a-z_.0-9]+)+)+X": 1}},
            r"'(.*\\.)?((([a-z_.0-9]+)+)+X)': trying it on the modules",
            marks=pytest.mark.slow,  # the next takes five seconds, too
        ),
        ({"target_modules": "(([a-z_.0-9]+)+)+X"}, "'(([a-z_.0-9]+)+)+X': trying it on the modules"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is pissa_niter_4, which moved the base's weights"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights is lora_ga, which moved the base's weights"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens: an activated LoRA"),
        ({"peft_type": "PREFIX_TUNING"}, "an adapter of type PREFIX_TUNING, which changes what goes through"),
    ],
)
def test_odd_values_of_an_adapter_config(
    changes: dict[str, Any],
    said: str,
    broken: tuple[Path, dict[str, torch.Tensor]],
    base_of: Callable[..., Path],
) -> None:
    edit_json(broken[0] / "adapter_config.json", **changes)
    (line,) = refused(base_of(), broken[0])
    assert line.startswith(f"adapter_config.json: {said}")


def test_an_adapter_without_weights(
    broken: tuple[Path, dict[str, torch.Tensor]], base_of: Callable[..., Path]
) -> None:
    (broken[0] / "adapter_model.safetensors").unlink()
    expected = "adapter_model.safetensors or adapter_model.bin"
    remedy = "Give another folder, or copy the missing file there."
    assert refused(base_of(), broken[0]) == [f"{broken[0]}: no weights; expected {expected}. {remedy}"]


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_factors_stop_the_merge(
    factor: str,
    value: float,
    broken: tuple[Path, dict[str, torch.Tensor]],
    base_of: Callable[..., Path],
    tmp_path: Path,
) -> None:
    adapter, tensors = broken
    tensors[KEY.format(factor)][1, 1] = value
    save_file(tensors, adapter / "adapter_model.safetensors")
    recipe = MergeRecipe(str(base_of()), {"expert": str(adapter)})
    text = f"expert: adapter_model.safetensors: {KEY.format(factor)} holds NaN or Inf. Repair or leave out this source"
    with pytest.raises(NonFiniteError, match=re.escape(text)):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_of_a_delta_are_the_rows_of_the_whole(base_of: Callable[..., Path], tmp_path: Path) -> None:
    """The merge asks for pieces; each is that part of B A."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"], r=4)
    source = open_adapter(base_of(), train(base_of(), tmp_path / "adapter", config))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        whole = source.rows(name, 0, 64)
        pieces = [source.rows(name, start, start + 16) for start in range(0, 64, 16)]
        np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=0, atol=1e-7)
