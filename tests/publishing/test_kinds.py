"""What is published beside merged models: a Mixtral, an extracted Llama and an adapter, and what is wrong with one."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from btx_merge import MergeRecipe, Options, export, extract, merge
from btx_merge.finetuning.recipe import TrainRecipe
from btx_merge.finetuning.run import train
from btx_merge.model.adapter_card import with_base
from btx_merge.publishing.checks import Publishable, examine
from btx_merge.publishing.kinds import BTX, kind_of
from btx_merge.texts.references import DomainText
from tests.conftest import Family
from tests.finetuning.test_run import ARGUMENTS
from tests.publishing.test_run import btx, error_of, home, hub, pushed, repository  # noqa: F401  fixtures
from tests.support.common import edit_json, files_of, problems_of, save_seed
from tests.support.hub_server import Hub

pytestmark = pytest.mark.usefixtures("loaded_here")


@pytest.fixture(scope="module")
def exported(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "mixtral"
    export(str(merged), folder, Options(max_shard_size="300KB"))
    return folder


@pytest.fixture(scope="module")
def extracted(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extracted") / "code"
    extract(str(merged), "code", folder)
    return folder


@pytest.fixture(scope="module")
def adapter(merged: Path, texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that was trained on a local folder."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    data = tuple(DomainText(name, (file,)) for name, file in texts.items())
    arguments = {**ARGUMENTS, "max_steps": 2}
    train(TrainRecipe(str(merged), data, "lora", lora_r=2, max_length=32, arguments=arguments), folder)
    return folder


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


refused = partial(problems_of, examine)


def published(folder: Path, **options: Any) -> Publishable:
    before = files_of(folder)
    checked = examine(folder, **options)
    assert files_of(folder) == before
    assert set(checked.files) == set(before)
    return checked


@pytest.mark.parametrize("kind", ["mixtral", "llama"])
def test_an_export_and_an_extract(exported: Path, extracted: Path, kind: str, tmp_path: Path) -> None:
    folder = exported if kind == "mixtral" else extracted
    assert published(folder).kind.name == kind
    assert set(published(folder, repo_id="org/m").changed) == {"README.md"}
    spoiled = copy_of(folder, tmp_path)
    (spoiled / "modeling_btx.py").write_text("")  # it needs none
    edit_json(spoiled / "config.json", intermediate_size=97, auto_map={"AutoConfig": "x.Y"})
    lines = refused(spoiled)
    assert lines[0] == "model: modeling_btx.py: a file that is no part of a model. " + (
        "Move it away: only the model is published."
    )
    assert any("config.json: auto_map: does not load where btx-merge is not installed" in line for line in lines)
    assert any("97" in line and "by config.json" in line for line in lines)
    assert len(lines) == 3


def test_a_tied_model_is_exported_without_a_head(tmp_path: Path) -> None:
    seed = save_seed(tmp_path / "seed", tie_word_embeddings=True)
    merge(MergeRecipe(str(seed), {"code": str(seed)}), tmp_path / "merged")
    export(str(tmp_path / "merged"), tmp_path / "mixtral")
    published(tmp_path / "mixtral")
    extract(str(tmp_path / "merged"), "code", tmp_path / "code")
    published(tmp_path / "code")


def test_a_llama_of_others_is_not_ours(family: Family, extracted: Path, tmp_path: Path) -> None:
    (line,) = refused(family.code)
    assert "model_type: 'llama'; expected 'btx', or what btx export, extract or train made" in line
    without_recipe = copy_of(extracted, tmp_path)
    (without_recipe / "btx_recipe.yaml").unlink()
    published(without_recipe)
    assert kind_of("llama", ["config.json"], "# Llama") is None
    assert kind_of("btx", ["config.json"], "") is BTX
    (line,) = refused(extracted, base_model="org/x")
    assert line == "command: --base-model: given, but this is a Llama of btx extract. Leave it out."


def test_what_an_adapter_says_of_itself(adapter: Path, merged: Path) -> None:
    card = ModelCard.load(adapter / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "text-generation")
    assert "base_model" not in data
    assert {result.metric_name for result in card.data.eval_results or []} == {
        "Perplexity",
        "Perplexity before the finetuning",
    }
    assert "More Information Needed" not in card.text
    assert str(merged.parent) not in card.content
    assert "- Adapted, with rank 2: its attention, and its routers" in card.text
    assert "| math | `math.jsonl` |" in card.text


def test_the_code_in_an_adapters_card_runs(
    adapter: Path, merged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(merged.parent)
    exec(code.replace('path = "."', f'path = "{adapter}"'), {})
    assert capsys.readouterr().out.strip()


def test_an_adapter_names_the_base_that_others_can_load(adapter: Path, merged: Path) -> None:
    (line,) = refused(adapter)
    assert line == (
        f"model: adapter_config.json: base_model_name_or_path: '{merged}'; expected the base's id on the Hub, "
        "org/name. Publish its base first, and give the base's id: --base-model org/name."
    )
    (line,) = refused(adapter, base_model="./merged")
    assert line.startswith("model: --base-model: './merged'; expected the base's id on the Hub")
    checked = published(adapter, repo_id="org/lora", base_model="org/m@v2")
    assert set(checked.changed) == {"README.md", "adapter_config.json"}
    config = json.loads(checked.changed["adapter_config.json"])
    assert (config.pop("base_model_name_or_path"), config.pop("revision")) == ("org/m", "v2")
    before = json.loads((adapter / "adapter_config.json").read_text())
    assert {key: before[key] for key in config} == config
    card = ModelCard(checked.changed["README.md"])
    assert card.data.base_model == ["org/m"]
    assert card.data["base_model_relation"] == "adapter"
    assert '\nbase = "org/m"  #' in card.text
    assert '\nrevision = "v2"  #' in card.text
    assert '\npath = "org/lora"  #' in card.text
    assert "- Base model: [org/m](https://huggingface.co/org/m) at revision v2." in card.text
    assert with_base("# no metadata\n", "org/m", None) == "# no metadata\n"


def test_an_adapter_that_is_damaged(adapter: Path, tmp_path: Path) -> None:
    folder = copy_of(adapter, tmp_path)
    weights = load_file(folder / "adapter_model.safetensors")
    names = sorted(weights)
    del weights[names[0]]
    weights[names[3]] = torch.zeros(weights[names[3]].shape[0], 7)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "optimizer.pt").write_text("x")
    lines = refused(folder, base_model="org/m")
    assert any(f"{names[1]} is there without {names[0]}" in line for line in lines)
    assert any("expected one rank" in line for line in lines)
    assert any(line.startswith("model: optimizer.pt: a file that is no part of a model") for line in lines)
    assert len(lines) == 3
    (folder / "optimizer.pt").unlink()
    (folder / "adapter_model.safetensors").unlink()
    edit_json(folder / "adapter_config.json", peft_type="LOHA")
    assert [line.split(": ")[1] for line in refused(folder, base_model="org/m")][:2] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_an_adapter_of_a_model_from_the_hub_records_its_id(
    merged: Path, texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in the Hub's cache is known by its id and commit, which peft keeps apart."""
    commit = "0f" * 20
    base = Path(shutil.copytree(merged, tmp_path / "models--org--m/snapshots" / commit))
    data = (DomainText("code", (texts["code"],)),)
    recipe = TrainRecipe(str(base), data, "lora", lora_r=2, max_length=32, arguments={**ARGUMENTS, "max_steps": 1})
    train(recipe, tmp_path / "lora")
    config = LoraConfig.from_pretrained(tmp_path / "lora")
    assert (config.base_model_name_or_path, config.revision) == ("org/m", commit)
    assert set(published(tmp_path / "lora").changed) == set()
    data_of_card = ModelCard.load(tmp_path / "lora/README.md").data
    assert data_of_card.base_model == ["org/m"]
    assert data_of_card["base_model_relation"] == "adapter"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(merged), tmp_path / "lora")


# To the small Hub


def test_each_kind_has_its_repository(
    hub: Hub,  # noqa: F811
    home: Path,  # noqa: F811
    exported: Path,
    extracted: Path,
    adapter: Path,
    family: Family,
) -> None:
    assert pushed(hub, home, exported, "org/mixtral")["adapted"] == ["README.md"]
    assert pushed(hub, home, extracted, "org/code")["adapted"] == ["README.md"]
    report = pushed(hub, home, adapter, "org/lora", "--base-model", "org/m")
    assert sorted(report["adapted"]) == ["README.md", "adapter_config.json"]
    for folder, name in ((exported, "mixtral"), (extracted, "code"), (adapter, "lora")):
        there, here = repository(hub, f"org/{name}"), files_of(folder)
        assert there.keys() == here.keys()
        assert {key for key in here if here[key] != there[key]} <= {"README.md", "adapter_config.json"}
        assert b'\npath = "org/' + name.encode() + b'"  #' in there["README.md"]
    config = json.loads(repository(hub, "org/lora")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "org/m"
    assert pushed(hub, home, extracted, "org/code")["files"] == []
    line = error_of(btx(hub, home, "push", extracted, "org/mixtral"))
    assert "a model of type 'mixtral'; expected none, or an empty one, or one with a Llama of btx extract" in line
    line = error_of(btx(hub, home, "push", exported, "org/lora"))
    assert "the repository holds an adapter; expected" in line
    hub.add("org/llama", family.code)
    line = error_of(btx(hub, home, "push", extracted, "org/llama"))
    assert "the repository holds a model of type 'llama' that is not of btx-merge; expected" in line
