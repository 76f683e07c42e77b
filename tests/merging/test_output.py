"""The folder that a merge leaves: which files, what stands in them, and that it works where it lies."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoTokenizer
from typer.testing import CliRunner

import btx_merge.sources.opening
from btx_merge import MergeRecipe, merge
from btx_merge.cli.app import app
from btx_merge.sources.locate import Located
from tests.support import warm
from tests.support.common import (
    TINY_CONFIG,
    WITHOUT_BTX_MERGE,
    assert_complete,
    edit_json,
    files_of,
    grow,
    save_seed,
    tensors_of,
    tiny_tokenizer,
    without_next,
)

FILES = {
    "README.md",
    "btx_recipe.yaml",
    "config.json",
    "configuration_btx.py",
    "experts_btx.py",
    "generation_config.json",
    "model.safetensors",
    "modeling_btx.py",
    "routing_btx.py",
    "tokenizer.json",
    "tokenizer_config.json",
}
TENSORS = {  # of the tiny family, L = 2, E = 3: names and shapes are a contract
    "model.embed_tokens.weight": (128, 64),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in (0, 1)
        for name, shape in {
            "input_layernorm.weight": (64,),
            "self_attn.q_proj.weight": (64, 64),
            "self_attn.k_proj.weight": (32, 64),
            "self_attn.v_proj.weight": (32, 64),
            "self_attn.o_proj.weight": (64, 64),
            "post_attention_layernorm.weight": (64,),
            "mlp.gate.weight": (3, 64),
            "mlp.experts.gate_up_proj": (3, 192, 64),
            "mlp.experts.down_proj": (3, 64, 96),
        }.items()
    },
    "model.norm.weight": (64,),
    "lm_head.weight": (128, 64),
}


@pytest.fixture(scope="module")
def merged(family, tmp_path_factory):
    """The plain merge of the family, for tests that only read it."""
    out = tmp_path_factory.mktemp("merged") / "llama-btx"
    merge(MergeRecipe(str(family.seed), family.experts), out)
    return out


def front_matter(folder: Path) -> dict:
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_the_folder_is_complete_and_holds_nothing_else(merged):
    assert_complete(merged)
    assert set(files_of(merged)) == FILES
    assert {name: tuple(tensor.shape) for name, tensor in tensors_of(merged).items()} == TENSORS


def test_config(merged):
    config = json.loads((merged / "config.json").read_text())
    assert config == {
        "architectures": ["BTXForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_btx.BTXConfig",
            "AutoModel": "modeling_btx.BTXModel",
            "AutoModelForCausalLM": "modeling_btx.BTXForCausalLM",
            "AutoModelForSequenceClassification": "modeling_btx.BTXForSequenceClassification",
            "AutoModelForTokenClassification": "modeling_btx.BTXForTokenClassification",
        },
        "model_type": "btx",
        "dtype": "float32",
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "router_type": "top_k",
        "router_pre_softmax": False,
        "num_chunks": 1,
        "router_aux_loss_coef": 0.01,
        "output_router_logits": False,
        "expert_names": ["seed", "code", "math"],
        **TINY_CONFIG,
        "pretraining_tp": 1,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }


def test_tokenizer_and_generation_config_are_the_seeds(family, merged):
    ours, seeds = AutoTokenizer.from_pretrained(merged), AutoTokenizer.from_pretrained(family.seed)
    assert ours("w3 w1 w125 </s>").input_ids == seeds("w3 w1 w125 </s>").input_ids == [3, 1, 125, 127]
    assert ours.get_vocab() == seeds.get_vocab()
    assert (ours.bos_token, ours.eos_token) == ("<s>", "</s>")
    generation = json.loads((merged / "generation_config.json").read_text())
    expected = json.loads((family.seed / "generation_config.json").read_text())
    assert generation == {key: value for key, value in expected.items() if key != "_from_model_config"}


def test_model_card(merged):
    assert front_matter(merged) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["btx", "branch-train-mix", "mixture-of-experts", "merge"],
    }
    text = (merged / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| seed | `llama-seed` (a local folder) |  | 0 |",
        "| code | `llama-code` (a local folder) |  | 1 |",
        "| math | `llama-math` (a local folder) |  | 2 |",
    ]
    assert "`mean` over `seed`, `code`, `math`" in text
    assert "standard deviation 0.02" in text
    assert "https://arxiv.org/abs/2403.07816" in text


@pytest.mark.parametrize(
    ("options", "sentences"),
    [
        ({"expert_mode": "split"}, ["split into 2 experts", "| 2, 3 |"]),
        ({"expert_mode": "blend"}, ["blended from a part of every source", "| in every one |"]),
        ({"fold_norms": True}, ["absorbed its own norm"]),
        ({"combine": "seed"}, ["`seed` over the seed alone"]),
        ({"combine": "weighted", "seed_weight": 2}, ["`weighted` over `seed` (2), `code` (1), `math` (1)"]),
        ({"router_init": "zeros"}, ["zeros: every expert is equally likely"]),
        ({"router_std": 0.1}, ["standard deviation 0.1"]),
        ({"seed_expert": False}, ["| seed | `llama-seed` (a local folder) |  | none |", "over `code`, `math`"]),
    ],
)
def test_model_card_says_how(family, tmp_path, options, sentences):
    merge(MergeRecipe(str(family.seed), family.experts, **options), tmp_path / "out")
    for sentence in sentences:
        assert sentence in (tmp_path / "out" / "README.md").read_text()


def test_model_card_and_recipe_name_what_is_on_the_hub(family, tmp_path, monkeypatch):
    hub = {
        "org/llama@main": Located(family.seed, "org/llama", "5eed" * 10),
        "org/llama-code": Located(family.code, "org/llama-code", "c0de" * 10),
    }

    def locate(source, reference):
        return hub.get(reference) or Located(Path(reference))

    monkeypatch.setattr(btx_merge.sources.opening, "locate", locate)
    recipe = MergeRecipe("org/llama@main", {"code": "org/llama-code", "math": str(family.math)})
    merge(recipe, tmp_path / "out")
    metadata = front_matter(tmp_path / "out")
    assert metadata["base_model"] == ["org/llama", "org/llama-code"]
    assert metadata["base_model_relation"] == "merge"
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"| seed | [org/llama](https://huggingface.co/org/llama) | {'5eed' * 10} | 0 |" in text
    assert "| math | `llama-math` (a local folder) |  | 2 |" in text
    resolved = yaml.safe_load((tmp_path / "out" / "btx_recipe.yaml").read_text())
    assert resolved["seed"] == "org/llama@" + "5eed" * 10
    assert resolved["experts"]["code"]["model"] == "org/llama-code@" + "c0de" * 10
    assert resolved["experts"]["math"]["model"] == "llama-math"


APACHE = {"license": "apache-2.0"}
OTHER = {"license": "other", "license_name": "llama-code", "license_link": "https://example.org/licence"}
BESIDE = {**OTHER, "license_link": "LICENSE"}


@pytest.mark.parametrize(
    ("cards", "carried"),
    [
        ([APACHE, APACHE, APACHE], APACHE),
        ([OTHER, OTHER, OTHER], OTHER),
        # a file that does not come along: no link rather than one that leads nowhere
        ([BESIDE, BESIDE, BESIDE], {"license": "other", "license_name": "llama-code"}),
        ([APACHE, APACHE, {"license": "mit"}], {}),
        ([APACHE, APACHE, None], {}),
        ([APACHE, APACHE, {"language": "en"}], {}),
        ([OTHER, OTHER, {**OTHER, "license_name": "another"}], {}),  # `other` alone says nothing
        ([None, None, None], {}),
    ],
)
def test_the_licence_is_carried_only_when_all_agree(family, tmp_path, cards, carried):
    folders = []
    for number, (source, card) in enumerate(zip([family.seed, family.code, family.math], cards, strict=True)):
        folder = tmp_path / f"source{number}"
        folder.mkdir()
        for file in source.iterdir():
            shutil.copyfile(file, folder / file.name)
        if card is not None:
            (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n# A model\n")
        folders.append(str(folder))
    merge(MergeRecipe(folders[0], {"code": folders[1], "math": folders[2]}), tmp_path / "out")
    metadata = front_matter(tmp_path / "out")
    assert {key: value for key, value in metadata.items() if key.startswith("license")} == carried
    if cards[2] == {"language": "en"}:
        assert metadata["language"] == ["en"]


def test_no_path_of_this_machine_and_no_code_of_a_source_stands_in_the_result(tmp_path):
    """Sources name paths in many places; checkpoints are published."""
    private = tmp_path / "home" / "somebody"
    seed = save_seed(private / "llama-seed")
    code = grow(seed, private / "llama-code")
    for folder in (seed, code):
        edit_json(folder / "config.json", _name_or_path=str(folder), auto_map={"AutoConfig": "evil.Config"})
        paths = {key: str(folder / key) for key in ("special_tokens_map_file", "tokenizer_file", "vocab_file")}
        edit_json(folder / "tokenizer_config.json", name_or_path=str(folder), **paths)
        (folder / "evil.py").write_text("raise SystemExit('code of a source ran')")
        (folder / "README.md").write_text(f"---\nlicense: mit\n---\nTrained in {folder}\n")
    merge(MergeRecipe(str(seed), {"code": str(code)}, tokenizer_source="code"), private / "out")
    found = files_of(private / "out")
    assert set(found) == FILES
    for name, content in found.items():
        assert str(tmp_path).encode() not in content, name
        assert b"somebody" not in content, name
        assert b"evil" not in content, name


def test_the_cards_snippet_runs_without_this_package(merged, tmp_path):
    """As a person would run it who has downloaded the folder and knows nothing of btx-merge."""
    [snippet] = re.findall(r"```python\n(.*?)```", (merged / "README.md").read_text(), re.DOTALL)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", WITHOUT_BTX_MERGE + snippet]
    done = warm.run(command, cwd=merged, env=environment, level="transformers")
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[:3] == ["w0", "w0", "w0"]  # three words unknown to the tiny tokenizer
    assert len(words) > 3
    assert set(files_of(merged)) == FILES  # no __pycache__ or the like


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--combine", "weighted", "--weight", "code=2", "--expert-mode", "split", "--num-chunks", "3"],
        ["--no-seed-expert", "--fold-norms", "--dtype", "bfloat16", "--random-seed", "5", "--max-shard-size", "90KB"],
        ["--combine", "dare_ties", "--density", "0.5", "--scale", "0.7", "--router-init", "zeros"],
    ],
)
def test_the_recipe_in_the_folder_gives_the_same_bytes_again(family, tmp_path, flags):
    folders = ["--seed", str(family.seed), "--expert", f"code={family.code}", "--expert", f"math={family.math}"]
    first, again = tmp_path / "first", tmp_path / "again"
    done = CliRunner().invoke(app, ["merge", *folders, *flags, "-o", str(first)])
    assert done.exit_code == 0, done.output
    recipe = ["--recipe", str(first / "btx_recipe.yaml")]
    done = CliRunner().invoke(app, ["merge", *recipe, *folders, "-o", str(again)])
    assert done.exit_code == 0, done.output
    assert files_of(again) == files_of(first)


def test_a_merged_model_is_a_recipe_for_itself(family, texts, tmp_path):
    """Its recipe names folders without their paths: they are found beside it, as its texts are."""
    for name in ("llama-seed", "llama-code", "llama-math"):
        shutil.copytree(getattr(family, name.removeprefix("llama-")), tmp_path / name)
    for text in texts.values():
        shutil.copy(text, tmp_path)
    fitted = {"router_init": "ridge", "combine": "regmean_merged", "domain_text": texts}
    merge(MergeRecipe(str(family.seed), family.experts, **fitted), tmp_path / "first")
    done = CliRunner().invoke(app, ["merge", "--recipe", str(tmp_path / "first"), "-o", str(tmp_path / "again")])
    assert (done.exit_code, without_next(done.stderr)) == (0, "")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "first")
    assert MergeRecipe.from_yaml(tmp_path / "first").seed == str(tmp_path / "llama-seed")


@pytest.mark.parametrize(("key", "done_to_it"), [("fits", "fitted"), ("training", "trained"), ("edits", "edited")])
def test_what_a_recipe_does_not_repeat_is_said(merged, family, tmp_path, key, done_to_it):
    shutil.copytree(merged, tmp_path / "model")
    with (tmp_path / "model/btx_recipe.yaml").open("a") as file:
        file.write(f"{key}:\n- tools: {{}}\n")
    words = ["check", "--recipe", str(tmp_path / "model"), "--seed", str(family.seed)]
    words += [word for name, model in family.experts.items() for word in ("--expert", f"{name}={model}")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    expected = f"the model was {done_to_it} since it was merged; its recipe gives the merge alone."
    assert done.stderr == f"note: {tmp_path / 'model/btx_recipe.yaml'}: {expected}\n"


def test_the_resolved_recipe_leaves_nothing_open(family, merged):
    resolved = yaml.safe_load((merged / "btx_recipe.yaml").read_text())
    tools = resolved.pop("resolved")["tools"]
    assert set(tools) == {"python", "btx-merge", "numpy"}
    assert resolved["dtype"] == "float32"
    assert resolved["router_std"] == 0.02
    assert resolved["random_seed"] == 0
    assert resolved["experts"] == {
        "code": {"model": "llama-code", "weight": 1.0, "base": None},
        "math": {"model": "llama-math", "weight": 1.0, "base": None},
    }
    assert not [key for key, value in resolved.items() if value is None]
    assert MergeRecipe.from_dict(resolved).to_dict() == resolved  # and so every field is in it


@pytest.mark.parametrize("size", ["50KB", "120KiB", "0.2MB"])
def test_shards(family, merged, tmp_path, size):
    limit = {"50KB": 50_000, "120KiB": 122_880, "0.2MB": 200_000}[size]
    report = merge(MergeRecipe(str(family.seed), family.experts, max_shard_size=size), tmp_path / "out")
    assert_complete(tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(shards)
    assert count > 1
    assert [shard.name for shard in shards] == [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    seen = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        size_of_data = sum(tensor.nbytes for tensor in tensors.values())
        assert size_of_data <= limit or len(tensors) == 1  # a tensor is never cut
        seen |= dict.fromkeys(tensors, shard.name)
    assert index["weight_map"] == seen
    in_one = tensors_of(merged)
    assert index["metadata"] == {
        "total_size": sum(tensor.nbytes for tensor in in_one.values()),
        "total_parameters": sum(tensor.numel() for tensor in in_one.values()),
    }
    assert report.checked.plan.parameters == index["metadata"]["total_parameters"]
    in_shards = tensors_of(tmp_path / "out")
    assert in_shards.keys() == in_one.keys()
    assert all(torch.equal(in_shards[name], in_one[name]) for name in in_one)
    assert set(files_of(tmp_path / "out")) - {shard.name for shard in shards} == (
        FILES - {"model.safetensors"} | {"model.safetensors.index.json"}
    )


def test_data_is_aligned_and_the_files_sizes_are_the_plans(family, tmp_path):
    """8 bytes, as safetensors' own writer does: others map the file into memory."""
    report = merge(MergeRecipe(str(family.seed), family.experts, max_shard_size="100KB"), tmp_path / "out")
    plan = report.checked.plan
    total = 0
    for shard in plan.shards:
        content = (tmp_path / "out" / shard.name).read_bytes()
        assert (8 + int.from_bytes(content[:8], "little")) % 8 == 0
        total += len(content)
    assert total == plan.bytes_to_write


def test_active_parameters(family, tmp_path):
    """By hand: per layer and expert 3 * 96 * 64, of which two of three are active."""
    report = merge(MergeRecipe(str(family.seed), family.experts), tmp_path / "out")
    plan = report.checked.plan
    expert = 3 * 96 * 64
    shared = 2 * 128 * 64 + 64 + 2 * (2 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64)
    assert plan.parameters == shared + 2 * 3 * expert
    assert plan.active_parameters == shared + 2 * 2 * expert


@pytest.mark.parametrize("grown", [False, True])
def test_files_that_list_added_tokens_are_left_out_where_tokens_were_added(tmp_path, grown):
    """They are copies of what tokenizer.json says, and would not know the new ones."""
    seed = save_seed(tmp_path / "seed")
    (seed / "added_tokens.json").write_text('{"</s>": 127}')
    (seed / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    code = grow(
        seed,
        tmp_path / "code",
        change=lambda model: model.resize_token_embeddings(129) if grown else None,
        tokenizer=tiny_tokenizer(["<code>"] if grown else None),
    )
    merge(MergeRecipe(str(seed), {"code": str(code)}), tmp_path / "out")
    files = set(files_of(tmp_path / "out"))
    assert files == FILES | {"special_tokens_map.json"} | (set() if grown else {"added_tokens.json"})
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1 <code>").input_ids == [1, 128 if grown else 0]
