"""The recipe that a merge leaves is held against the models that it finds: another one of that name is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from btx_merge import InputError, MergeRecipe, check, merge
from btx_merge.cli.app import app
from tests.conftest import Family
from tests.support.common import files_of, grow


@pytest.fixture
def runs(family: Family, tmp_path: Path) -> Path:
    """Three runs of a trainer, whose models lie in folders of one name, and their merge beside the first."""
    for run, model in (("a", family.seed), ("b", family.code), ("c", family.math)):
        shutil.copytree(model, tmp_path / run / "checkpoint-1000")
    a, b, c = (str(tmp_path / run / "checkpoint-1000") for run in "abc")
    merge(MergeRecipe(a, {"x": b, "y": c}), tmp_path / "a/merged")
    return tmp_path


def refused(*words: object) -> list[str]:
    done = CliRunner().invoke(app, ["check", *map(str, words)])
    assert done.exit_code == 2, done.output
    return [line for line in done.stderr.splitlines() if line.startswith("error")]


def test_sources_of_one_name_are_not_taken_from_one_folder(runs: Path) -> None:
    (error,) = refused("--recipe", runs / "a/merged")
    place = runs / "a/checkpoint-1000"
    assert error.endswith(
        f"/a/merged/btx_recipe.yaml: seed, x, y: all found in {place}, for the recipe leaves out paths; "
        "expected a folder for each. Give --seed MODEL --expert x=MODEL --expert y=MODEL."
    )
    with pytest.raises(InputError, match="seed, x, y: all found in "):
        MergeRecipe.from_yaml(runs / "a/merged")
    shutil.copy(runs / "a/merged/btx_recipe.yaml", runs / "a/mine.yaml")
    assert "seed, x, y: all found in" in refused("--recipe", runs / "a/mine.yaml")[0]
    # of a model merged before digests were written
    file = runs / "a/merged/btx_recipe.yaml"
    values = yaml.safe_load(file.read_text())
    del values["resolved"]
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    assert "seed, x, y: all found in" in refused("--recipe", file)[0]


def test_with_the_right_folders_it_gives_the_same_bytes(runs: Path) -> None:
    words = ["--expert", f"x={runs / 'b/checkpoint-1000'}", "--expert", f"y={runs / 'c/checkpoint-1000'}"]
    done = CliRunner().invoke(
        app, ["merge", "--recipe", str(runs / "a/merged"), *words, "-o", str(runs / "again"), "--quiet"]
    )
    assert (done.exit_code, done.output) == (0, "")
    assert files_of(runs / "again") == files_of(runs / "a/merged")


def test_another_model_of_that_name_is_refused_by_name(runs: Path, family: Family) -> None:
    """Also one that differs in a single layer; a flag that names another model means it."""
    merge(MergeRecipe(str(family.seed), family.experts), runs / "d/merged")
    for model in (family.seed, family.math):
        shutil.copytree(model, runs / "d" / model.name)
    grow(family.seed, runs / "d/llama-code", random_seed=9)
    (error,) = refused("--recipe", runs / "d/merged")
    assert error.startswith(f"error: code: {runs}/d/llama-code: not the model that this recipe was written for")
    assert error.endswith("by --expert code=MODEL, or take `resolved` out of the recipe, if this one is meant.")
    with pytest.raises(InputError, match=r"code: .*not the model that this recipe was written for"):
        check(MergeRecipe.from_yaml(runs / "d/merged"))
    for flags in (["--expert", f"code={runs}/d/llama-code"], ["--expert", f"code={family.code}"]):
        done = CliRunner().invoke(app, ["check", "--recipe", str(runs / "d/merged"), *flags])
        assert done.exit_code == 0, done.output
    assert "code" in check(MergeRecipe.from_yaml(runs / "d/merged", experts=family.experts)).plan.expert_names
    file = runs / "d/merged/btx_recipe.yaml"
    values = yaml.safe_load(file.read_text())
    assert set(values["resolved"]["sources"]) == {"seed", "code", "math"}
    del values["resolved"]
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    assert CliRunner().invoke(app, ["check", "--recipe", str(runs / "d/merged")]).exit_code == 0


def test_copies_of_one_model_may_lie_in_one_folder(runs: Path, family: Family) -> None:
    """Experts that are to be told apart by training, all grown from one."""
    shutil.copytree(family.seed, runs / "e/base")
    base = str(runs / "e/base")
    merge(MergeRecipe(base, {"x": base, "y": base}), runs / "e/merged")
    assert CliRunner().invoke(app, ["check", "--recipe", str(runs / "e/merged")]).exit_code == 0


def test_folders_that_are_not_beside_the_recipe_get_their_flags_at_once(runs: Path) -> None:
    shutil.copytree(runs / "a/merged", runs / "elsewhere/merged")
    done = CliRunner().invoke(app, ["check", "--recipe", str(runs / "elsewhere/merged")])
    assert done.exit_code == 2
    note = (
        "it leaves out paths of local folders. Give --seed MODEL --expert x=MODEL --expert y=MODEL where they lie now."
    )
    assert f"btx_recipe.yaml: {note}" in done.stderr


@pytest.mark.parametrize("sources", [5, [1], {"code": 5}, {7: "x"}, "text"])
def test_digests_that_cannot_be_meant(sources: object) -> None:
    with pytest.raises(InputError, match=r"recipe: resolved\.sources: .*Leave `resolved` out"):
        MergeRecipe("a", {"b": "c"}, resolved={"sources": sources})
