"""Files of mergekit-moe, read as recipes: what they become, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from btx_merge import ExpertSpec, MergeRecipe, merge
from btx_merge.architectures.btx import ROUTER
from tests.cli.test_app import btx, errors_of
from tests.conftest import Family
from tests.support.common import problems_of, raw_bytes, tensors_of


def written(folder: Path, text: str) -> Path:
    file = folder / "moe.yaml"
    file.write_text(text)
    return file


@pytest.fixture
def folder(family: Family, tmp_path: Path) -> Path:
    """A folder with the seed and its experts, as a file beside them names them."""
    for source in (family.seed, family.code, family.math):
        shutil.copytree(source, tmp_path / source.name)
    return tmp_path


EXAMPLE = """
base_model: org/base@main
gate_mode: hidden
dtype: bfloat16
experts_per_token: 2
experts:
  - source_model: org/llama-code
    positive_prompts: ["def f():", "import os"]
    negative_prompts: ["a story"]
  - source_model: org/base@main
    positive_prompts: [hello]
  - source_model: other/llama-code@0123+org/lora
    positive_prompts: [two plus two]
  - source_model: org/base@main+me/llama-code
    positive_prompts: [w1]
"""


def test_what_each_key_becomes(tmp_path: Path) -> None:
    recipe = MergeRecipe.from_yaml(written(tmp_path, EXAMPLE))
    assert recipe == MergeRecipe(
        "org/base@main",
        {
            "llama-code": "org/llama-code",
            "lora": ExpertSpec("org/lora", base="other/llama-code@0123"),
            "llama-code-2": "me/llama-code",
        },
        combine="seed",
        router_init="prompts",
        prompts={
            "llama-code": ["def f():", "import os"],
            "seed": ["hello"],
            "lora": ["two plus two"],
            "llama-code-2": ["w1"],
        },
        dtype="bfloat16",
    )


def test_the_note_says_how_it_is_read(tmp_path: Path) -> None:
    done = btx("merge", "--recipe", written(tmp_path, EXAMPLE), "--print-recipe")
    assert done.returncode == 0
    assert done.stderr.startswith(f"note: {tmp_path / 'moe.yaml'} is a file of mergekit-moe, read as: ")
    for text in ("the seed is org/base@main", "combine: seed", "negative_prompts of llama-code left out"):
        assert text in done.stderr
    values = yaml.safe_load(done.stdout)
    assert (values["seed"], values["router_init"]) == ("org/base@main", "prompts")


@pytest.mark.parametrize(("mode", "std"), [("random", 1.0), ("uniform_random", 0.02)])
def test_a_merge_with_random_routers(mode: str, std: float, folder: Path) -> None:
    """Everything but the feed-forward blocks is the base's bytes, and the base is no expert if it is not listed."""
    text = {"base_model": "llama-seed", "gate_mode": mode, "experts_per_token": 1}
    sources: list[Any] = [{"source_model": "llama-code"}, {"source_model": "./llama-math"}]
    file = written(folder, yaml.safe_dump({**text, "experts": sources}))
    done = btx("merge", "--recipe", file, "-o", folder / "out", cwd=folder.parent)
    assert done.returncode == 0
    ours, base = tensors_of(folder / "out"), tensors_of(folder / "llama-seed")
    shared = [name for name in base if ".mlp." not in name]
    assert all(raw_bytes(ours[name]) == raw_bytes(base[name]) for name in shared)
    router = ours[ROUTER.format(layer=0)]
    assert router.shape[0] == 2
    assert 0.7 * std < router.std() < 1.4 * std
    for number, name in enumerate(("llama-code", "llama-math")):
        up = tensors_of(folder / name)["model.layers.0.mlp.up_proj.weight"]
        assert torch.equal(ours["model.layers.0.mlp.experts.gate_up_proj"][number, len(up) :], up)


def test_a_merge_with_prompts_and_an_adapter(folder: Path) -> None:
    """`base+adapter` is an adapter on the base; without a gate_mode the routers come from the prompts."""
    model = LlamaForCausalLM.from_pretrained(folder / "llama-seed")
    adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj"], r=2, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.05)  # as small as what a training leaves
    adapted.save_pretrained(folder / "lora")
    seed = str(folder / "llama-seed")
    values = {
        "base_model": seed,
        "experts": [
            {"source_model": str(folder / "llama-code"), "positive_prompts": ["w1 w2"]},
            {"source_model": f"{seed}+{folder / 'lora'}", "positive_prompts": ["w70 w71"]},
        ],
    }
    merge(MergeRecipe.from_yaml(written(folder, yaml.safe_dump(values))), folder / "out")
    up = adapted.merge_and_unload().state_dict()["model.layers.0.mlp.up_proj.weight"]
    stored = tensors_of(folder / "out")["model.layers.0.mlp.experts.gate_up_proj"][1, len(up) :]
    torch.testing.assert_close(stored, up, atol=1e-6, rtol=1e-5)
    assert len(set(tensors_of(folder / "out")[ROUTER.format(layer=0)].flatten().tolist())) > 2


REFUSED = """
base_model: org/base
gate_mode: cheap_embed
shared_experts: [{source_model: org/x}]
colour: red
experts:
  - source_model: org/a
    positive_prompts: [a]
    noise_scale: 0.1
    residual_scale: 0.5
  - {model: org/b}
  - [org/c]
"""


def test_what_is_refused_comes_in_one_report(tmp_path: Path) -> None:
    lines = errors_of(btx("check", "--recipe", written(tmp_path, REFUSED)))
    assert all(line.startswith(f"{tmp_path / 'moe.yaml'}: ") for line in lines)
    said = [line.removeprefix(f"{tmp_path / 'moe.yaml'}: ") for line in lines]
    for beginning in (
        "colour: unknown key",
        "gate_mode: cheap_embed: one router for all layers",
        "shared_experts: experts that every token passes through. BTX has none.",
        "experts[0].noise_scale: 0.1. BTX keeps an expert's weights",
        "experts[0].residual_scale: 0.5. BTX keeps",
        "experts[1]: {'model': 'org/b'}; expected `source_model:",
        "experts[2]: ['org/c']; expected `source_model:",
    ):
        assert [line for line in said if line.startswith(beginning)], (beginning, said)
    assert len(said) == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base_model: a/b", "experts: None; expected a list"),
        ("base_model: a/b\nexperts: {c: d}", "experts: {'c': 'd'}; expected a list"),
        ("base_model: 3\nexperts: [{source_model: a, positive_prompts: [b]}]", "base_model: 3; expected a folder"),
        ("base_model: a/b\ngate_mode: x\nexperts: [{source_model: a}]", "gate_mode: 'x'; expected one of hidden"),
        ("base_model: a/b\ngate_mode: [x]\nexperts: [{source_model: a}]", "gate_mode: ['x']; expected one of hidden"),
        ("base_model: a/b\nexperts: [{source_model: a}]", "experts[0].positive_prompts: missing; expected lines"),
        (
            "base_model: a+b\ngate_mode: random\nexperts: [{source_model: a}]",
            "base_model: a+b, an adapter; expected",
        ),
        (
            "merge_method: ties\nmodels: [{model: a}]",
            "merge_method: a file of mergekit, for a merge into a dense",
        ),
    ],
)
def test_what_mergekit_would_not_take_either(text: str, said: str, tmp_path: Path) -> None:
    (line,) = problems_of(MergeRecipe.from_yaml, written(tmp_path, text))
    assert line.startswith(f"{tmp_path / 'moe.yaml'}: {said}")
