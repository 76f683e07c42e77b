"""`extract`: one expert as a dense Llama, against the model that it was in and against what it once was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

import btx_merge
from btx_merge import InputError, MergeInterrupted, MergeRecipe, Options, extract, merge
from tests.checkpoints.test_staging import ctrl_c_after
from tests.exporting.test_run import load
from tests.support.common import (
    TINY_CONFIG,
    Told,
    edit_json,
    files_of,
    force_expert,
    grow,
    logits_of,
    problems_of,
    raw_bytes,
    save_seed,
    tensors_of,
)

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def feed_forward(folder: Path) -> dict[str, bytes]:
    return {name: raw_bytes(tensor) for name, tensor in tensors_of(folder).items() if ".mlp." in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 24}])
def test_the_logits_are_those_of_the_model_with_every_token_sent_there(tmp_path, dtype, options):
    seed = save_seed(tmp_path / "seed", dtype=dtype, **options)
    experts = {name: str(grow(seed, tmp_path / name, random_seed=n)) for n, name in enumerate("ab", 1)}
    merge(MergeRecipe(str(seed), experts), tmp_path / "merged")
    for number, name in enumerate(("seed", "a", "b")):
        extract(str(tmp_path / "merged"), name, tmp_path / f"of-{name}")
        dense = load(tmp_path / f"of-{name}")
        assert type(dense) is LlamaForCausalLM
        assert dense.dtype == dtype
        whole = load(tmp_path / "merged")
        force_expert(whole, number)
        assert torch.equal(logits_of(dense), logits_of(whole))
        source = tmp_path / name
        assert feed_forward(tmp_path / f"of-{name}") == feed_forward(source)
        assert tensors_of(tmp_path / f"of-{name}").keys() == tensors_of(source).keys()


@pytest.mark.parametrize("mode", ["whole", "split", "blend"])
def test_copies_of_one_seed_give_back_the_seed(tmp_path, mode):
    """Every tensor, byte by byte; of a blend that is one expert's part of each source. (In bfloat16: the mean of three
    equal numbers is that number where their sum has bits to spare.)"""
    seed = save_seed(tmp_path / "seed", dtype=torch.bfloat16)
    for name in ("code", "math"):
        shutil.copytree(seed, tmp_path / name)
    recipe = MergeRecipe(str(seed), {n: str(tmp_path / n) for n in ("code", "math")}, expert_mode=mode)
    merge(recipe, tmp_path / "merged")
    name = "blend.0" if mode == "blend" else "math"
    extract(str(tmp_path / "merged"), name, tmp_path / "out")
    ours, seeds = tensors_of(tmp_path / "out"), tensors_of(seed)
    assert ours.keys() == seeds.keys()
    for key, tensor in seeds.items():
        if mode == "blend" and ".mlp." in key:
            by_columns = "down_proj" in key
            width = tensor.shape[by_columns] // 3
            part = tensor[:, :width] if by_columns else tensor[:width]
            tensor = torch.cat([part] * 3, dim=int(by_columns))
        assert raw_bytes(ours[key]) == raw_bytes(tensor), key


def test_a_split_source_is_put_together_again(family, tmp_path):
    recipe = MergeRecipe(str(family.seed), family.experts, expert_mode="split", num_chunks=3, num_experts_per_tok=6)
    merge(recipe, tmp_path / "merged")
    report = extract(str(tmp_path / "merged"), "code", tmp_path / "out", Options(max_shard_size="50KB"))
    assert feed_forward(tmp_path / "out") == feed_forward(family.code)
    assert json.loads((tmp_path / "out/config.json").read_text())["intermediate_size"] == 96
    assert len(report.files) > 3
    load(tmp_path / "out")
    with pytest.raises(InputError, match=r"no expert 'code\.0'; expected one of seed, code, math"):
        extract(str(tmp_path / "merged"), "code.0", tmp_path / "none")


def test_a_blended_expert(family, tmp_path):
    merge(MergeRecipe(str(family.seed), family.experts, expert_mode="blend"), tmp_path / "merged")
    extract(str(tmp_path / "merged"), "blend.1", tmp_path / "out")
    whole = load(tmp_path / "merged")
    force_expert(whole, 1)
    assert torch.equal(logits_of(load(tmp_path / "out")), logits_of(whole))


def test_what_another_expert_left_unfinished_is_not_kept(family, tmp_path, monkeypatch):
    """Two experts that were split lie in the same tensors, in other parts of them."""
    recipe = MergeRecipe(str(family.seed), family.experts, expert_mode="split", num_chunks=3)
    merge(recipe, tmp_path / "merged")
    monkeypatch.setattr("btx_merge.checkpoints.copying.JOB_BYTES", 10_000)
    with pytest.raises(MergeInterrupted):
        extract(
            str(tmp_path / "merged"),
            "code",
            tmp_path / "out",
            Options(workers=1),
            reporter=Told(bytes_done=ctrl_c_after(200_000)),
        )
    report = extract(str(tmp_path / "merged"), "math", tmp_path / "out")
    assert report.kept_bytes == 0
    assert feed_forward(tmp_path / "out") == feed_forward(family.math)


def test_names_with_dots_are_names(family, tmp_path):
    """`code.2` is not a chunk of `code` where nothing was split."""
    experts = {"code": str(family.code), "code.2": str(family.math)}
    merge(MergeRecipe(str(family.seed), experts), tmp_path / "merged")
    for name, source in (("code", family.code), ("code.2", family.math)):
        extract(str(tmp_path / "merged"), name, tmp_path / name)
        assert feed_forward(tmp_path / name) == feed_forward(source)


def test_what_was_taken_out_can_be_merged_again(merged, family, tmp_path):
    for name in ("seed", "code"):
        extract(str(merged), name, tmp_path / name)
    report = merge(MergeRecipe(str(tmp_path / "seed"), {"code": str(tmp_path / "code")}), tmp_path / "again")
    assert report.checked.warnings == ()
    extract(str(tmp_path / "again"), "code", tmp_path / "once more")
    assert files_of(tmp_path / "once more")["model.safetensors"] == files_of(tmp_path / "code")["model.safetensors"]


def test_all_its_files(merged, tmp_path):
    extract(str(merged), "code", tmp_path / "out")
    names = {"config.json", "generation_config.json", "model.safetensors", "README.md", "btx_recipe.yaml"}
    assert files_of(tmp_path / "out").keys() == names | {"tokenizer.json", "tokenizer_config.json"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **TINY_CONFIG,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "torch_dtype": "float32",
        "attention_bias": False,
        "mlp_bias": False,
    }
    card = (tmp_path / "out/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["llama", "merge"]
    assert "# The expert code of merged\n" in card
    assert f"`btx extract code` of btx-merge {btx_merge.__version__}" in card
    assert str(tmp_path.parent) not in "".join(
        file.read_text() for file in (tmp_path / "out").iterdir() if file.suffix != ".safetensors"
    )


def test_an_expert_that_there_is_not(merged, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("years of work")
    assert problems_of(extract, str(merged), "Code", tmp_path / "out", Options(max_shard_size="-1")) == [
        "command: --max-shard-size: '-1'; expected a size such as 5GB, 500MB or 5GiB",
        f"output: {tmp_path / 'out'}: not empty; expected an empty or a new folder. "
        "Give another --output, or --overwrite to replace it when the new model is complete.",
        "model: config.json: expert_names: no expert 'Code'; expected one of seed, code, math",
    ]
    assert files_of(tmp_path) == {"out/config.json": b"years of work"}


def test_experts_without_names_have_numbers(merged, family, tmp_path):
    shutil.copytree(merged, tmp_path / "merged")
    edit_json(tmp_path / "merged/config.json", expert_names=None)
    extract(str(tmp_path / "merged"), "2", tmp_path / "out")
    assert feed_forward(tmp_path / "out") == feed_forward(family.math)
