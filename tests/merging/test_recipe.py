"""Recipes from Python, from YAML and from flags: what is taken, what is refused and how that is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from btx_merge import ExpertSpec, InputError, MergeRecipe
from btx_merge.cli.app import app
from btx_merge.merging.recipe_file import read_recipe_file


def problems_of(**values: Any) -> dict[str, str]:
    """What a recipe of these values is refused for: where to the whole line."""
    with pytest.raises(InputError) as caught:
        MergeRecipe.from_dict({"seed": "org/seed", "experts": {"code": "org/code"}, **values}, "merge.yaml")
    assert {problem.source for problem in caught.value.problems} == {"merge.yaml"}
    return {problem.where: str(problem) for problem in caught.value.problems}


def recipe_by_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> MergeRecipe:
    """The recipe that `btx check` would carry out."""
    taken: list[MergeRecipe] = []
    monkeypatch.setattr("btx_merge.merging.run.check", lambda recipe: taken.append(recipe) or 1 / 0)
    result = CliRunner().invoke(app, ["check", *arguments])
    assert isinstance(result.exception, ZeroDivisionError), result.output
    return taken[0]


def refused_by_command(*arguments: str) -> list[str]:
    """The lines of a refusal."""
    result = CliRunner().invoke(app, ["check", *arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr.splitlines()


def test_keys_and_defaults_are_a_contract() -> None:
    recipe = MergeRecipe("org/seed", {"code": "org/code"})
    assert recipe.to_dict() == {
        "seed": "org/seed",
        "experts": {"code": {"model": "org/code", "weight": 1.0, "base": None}},
        "seed_expert": True,
        "seed_weight": 1.0,
        "combine": "mean",
        "head": "combined",
        "density": 0.8,
        "scale": 1.0,
        "expert_mode": "whole",
        "num_chunks": 2,
        "fold_norms": False,
        "router_init": "random",
        "router_std": None,
        "random_seed": 0,
        "domain_text": {},
        "domain_tokens": 200_000,
        "prompts": {},
        "router_ridge": 0.001,
        "regmean_ridge": 0.01,
        "fit_through": "expert",
        "router_type": "top_k",
        "router_pre_softmax": False,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.01,
        "dtype": None,
        "max_shard_size": "5GB",
        "tokenizer_source": "seed",
        "untie": False,
        "allow_nonfinite": False,
        "allow_unrelated": False,
    }


METHODS = "mean, weighted, seed, ties, dare_ties, dare_linear, regmean, regmean_merged"
FULL: dict[str, Any] = {
    "seed": "org/seed@v1",
    "experts": {
        "code": {"model": "org/code", "weight": 2.0, "base": None},
        "lora-1.b": {"model": "./math", "weight": 0.0, "base": "org/other"},
    },
    "seed_expert": False,
    "seed_weight": 0.5,
    "combine": "ties",
    "head": "combined",
    "density": 0.5,
    "scale": -0.5,
    "expert_mode": "split",
    "num_chunks": 3,
    "fold_norms": True,
    "router_init": "ridge",
    "router_std": 0.1,
    "random_seed": 7,
    "domain_text": {
        "code": {"text": ["org/text", "more.txt"], "weight": 2.0},
        "lora-1.b": {"text": ["b/*.parquet"], "weight": 1.0},
    },
    "domain_tokens": 1000,
    "prompts": {},
    "router_ridge": 0.5,
    "regmean_ridge": 0.25,
    "fit_through": "router",
    "router_type": "switch",
    "router_pre_softmax": True,
    "num_experts_per_tok": 6,
    "router_aux_loss_coef": 0.0,
    "dtype": "float16",
    "max_shard_size": "500MiB",
    "tokenizer_source": "code",
    "untie": True,
    "allow_nonfinite": True,
    "allow_unrelated": True,
}


def test_round_trip_of_every_key() -> None:
    recipe = MergeRecipe.from_dict(FULL)
    assert recipe.to_dict() == FULL
    assert {*FULL, "resolved"} == {item.name for item in dataclasses.fields(MergeRecipe)}
    assert MergeRecipe.from_dict(recipe.to_dict()) == recipe


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text(yaml.safe_dump(MergeRecipe.from_dict(FULL).to_dict()))
    (tmp_path / "math").mkdir()
    expected = json.loads(json.dumps(FULL))
    expected["experts"]["lora-1.b"]["model"] = str(tmp_path / "math")
    assert MergeRecipe.from_yaml(file).to_dict() == expected


def test_a_plain_string_or_a_path_stands_for_its_model() -> None:
    recipe = MergeRecipe(Path("seed-folder"), {"a": "org/a", "b": Path("b-folder"), "c": ExpertSpec("org/c")})
    assert recipe.seed == "seed-folder"
    assert recipe.experts == {"a": ExpertSpec("org/a"), "b": ExpertSpec("b-folder"), "c": ExpertSpec("org/c")}
    yaml.safe_dump(recipe.to_dict())  # a Path in it would raise


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5_000_000_000),
        ("500MB", 500_000_000),
        ("5GiB", 5 * 2**30),
        ("1.5 kb", 1500),
        ("100KB", 100_000),
        ("2TiB", 2**41),
        ("4096B", 4096),
        ("5g", 5_000_000_000),
    ],
)
def test_shard_sizes(text: str, nbytes: int) -> None:
    assert MergeRecipe("s", {"a": "b"}, max_shard_size=text).shard_bytes == nbytes


def test_unknown_keys_are_refused_with_the_nearest_known_one() -> None:
    found = problems_of(combin="mean", **{"num-chunks": 2, "qqq": 1})
    assert found["combin"] == "merge.yaml: combin: unknown key. Did you mean combine?"
    assert found["num-chunks"] == "merge.yaml: num-chunks: unknown key. Did you mean num_chunks?"
    assert found["qqq"].startswith("merge.yaml: qqq: unknown key. Known are: seed, experts, seed_expert, ")
    assert len(found) == 3


def test_unknown_keys_of_an_expert() -> None:
    found = problems_of(experts={"code": {"model": "org/code", "wieght": 2}})
    assert found == {"experts.code.wieght": "merge.yaml: experts.code.wieght: unknown key. Did you mean weight?"}


BAD_VALUES: list[tuple[str, Any, str]] = [
    ("seed", None, "missing; expected the model that all experts grew from"),
    ("seed", "", "missing; expected the model that all experts grew from"),
    ("seed", 5, "5; expected the model that all experts grew from"),
    ("experts", ["org/code"], "a list; expected `name: model`, one line per expert"),
    ("experts", None, "a NoneType; expected `name: model`, one line per expert"),
    ("seed_expert", "no", "'no'; expected true or false"),
    ("seed_expert", 1, "1; expected true or false"),
    ("seed_weight", -1, "-1; expected a number, at least 0"),
    ("seed_weight", float("nan"), "nan; expected a number, at least 0"),
    ("seed_weight", True, "True; expected a number"),
    ("combine", "slerp", f"'slerp'; expected one of {METHODS}"),
    ("combine", ["mean"], f"['mean']; expected one of {METHODS}"),
    ("density", 0, "0; expected in (0, 1]"),
    ("density", 1.01, "1.01; expected in (0, 1]"),
    ("density", "most", "'most'; expected a number"),
    ("scale", float("inf"), "inf; expected a finite number"),
    ("expert_mode", "half", "'half'; expected one of whole, split, blend"),
    ("num_chunks", 0, "0; expected at least 1"),
    ("num_chunks", 2.5, "2.5; expected a whole number"),
    ("fold_norms", "true", "'true'; expected true or false"),
    ("router_init", "ones", "'ones'; expected one of random, zeros, ridge, logistic, prompts"),
    ("router_type", "top_2", "'top_2'; expected one of top_k, switch, soft, sample_top_1"),
    ("router_std", 0, "0; expected above 0"),
    ("router_std", float("nan"), "nan; expected above 0"),
    ("random_seed", -1, "-1; expected in [0, 2**32)"),
    ("random_seed", 2**32, "4294967296; expected in [0, 2**32)"),
    ("random_seed", None, "None; expected a whole number"),
    ("num_experts_per_tok", 0, "0; expected at least 1"),
    ("num_experts_per_tok", 3, "3; expected in [1, 2], for there are 2 experts. Give --num-experts-per-tok."),
    ("router_aux_loss_coef", -0.01, "-0.01; expected at least 0"),
    ("dtype", "int8", "'int8'; expected one of bfloat16, float16, float32"),
    ("dtype", 16, "16; expected one of bfloat16, float16, float32"),
    ("max_shard_size", "5 apples", "'5 apples'; expected a size such as 5GB, 500MB or 5GiB"),
    ("max_shard_size", "0GB", "'0GB'; expected a size such as 5GB, 500MB or 5GiB"),
    ("max_shard_size", "5", "'5'; expected a size such as 5GB, 500MB or 5GiB. Say 5GB or 5MB."),
    ("max_shard_size", "-5GB", "'-5GB'; expected a size such as 5GB, 500MB or 5GiB"),
    ("tokenizer_source", "maths", "'maths'; expected one of seed, code"),
    ("untie", 1, "1; expected true or false"),
    ("allow_nonfinite", "yes", "'yes'; expected true or false"),
    ("allow_unrelated", None, "None; expected true or false"),
]


@pytest.mark.parametrize(("key", "value", "line"), BAD_VALUES)
def test_bad_values(key: str, value: Any, line: str) -> None:
    found = problems_of(**{key: value})
    assert {where: text.split(". In YAML")[0] for where, text in found.items()} == {key: f"merge.yaml: {key}: {line}"}


def test_a_size_of_400_digits() -> None:
    (line,) = problems_of(max_shard_size="9" * 400 + "GB").values()
    assert line.endswith("99GB'; expected a size such as 5GB, 500MB or 5GiB")
    assert len(line) < 400


def test_numbers_that_yaml_takes_for_text_are_explained() -> None:
    assert yaml.safe_load("router_std: 1e-2") == {"router_std": "1e-2"}  # the trap
    remedy = "In YAML a number stands without quotes, and with a point before an exponent: 1.0e-5."
    assert problems_of(router_std="1e-2") == {
        "router_std": f"merge.yaml: router_std: '1e-2'; expected a number. {remedy}"
    }


@pytest.mark.parametrize(
    ("spec", "where", "line"),
    [
        (5, "experts.x", "5; expected a model, or `model:` and `weight:`"),
        (None, "experts.x", "None; expected a model, or `model:` and `weight:`"),
        ("", "experts.x", "no model; expected `model: folder or org/name`"),
        ({"weight": 1}, "experts.x", "no model; expected `model: folder or org/name`"),
        ({"model": 5}, "experts.x.model", "5; expected a folder or org/name"),
        ({"model": "m", "weight": -1}, "experts.x.weight", "-1; expected a number, at least 0"),
        ({"model": "m", "weight": float("nan")}, "experts.x.weight", "nan; expected a number, at least 0"),
        ({"model": "m", "weight": float("inf")}, "experts.x.weight", "inf; expected a number, at least 0"),
        ({"model": "m", "weight": "2"}, "experts.x.weight", "'2'; expected a number, at least 0"),
        ({"model": "m", "weight": True}, "experts.x.weight", "True; expected a number, at least 0"),
        ({"model": "m", "base": 3}, "experts.x.base", "3; expected a folder or org/name"),
        (ExpertSpec("m", weight=-2), "experts.x.weight", "-2; expected a number, at least 0"),
    ],
)
def test_bad_experts(spec: Any, where: str, line: str) -> None:
    assert problems_of(experts={"x": spec}) == {where: f"merge.yaml: {where}: {line}"}


@pytest.mark.parametrize("name", ["seed", "", "a b", "a/b", "-a", ".a", "ü", 1, None])
def test_bad_names(name: Any) -> None:
    (line,) = problems_of(experts={name: "org/code"}).values()
    assert line.startswith(f"merge.yaml: experts: the name {name!r}; expected letters, digits, ")


def test_all_problems_come_in_one_report() -> None:
    """Unknown keys, wrong kinds, bad values and bad experts, from one look at the file."""
    found = problems_of(
        combin="mean",
        seed=None,
        seed_expert="no",
        density=2,
        experts={"x": {"model": "m", "weight": -1, "wieght": 1}, "seed": "m", "z": 5},
        dtype="int8",
    )
    assert set(found) == {
        "combin",
        "seed",
        "seed_expert",
        "density",
        "experts.x.weight",
        "experts.x.wieght",
        "experts",
        "experts.z",
        "dtype",
    }


@pytest.mark.parametrize("seed_expert", [True, False])
def test_no_experts(seed_expert: bool) -> None:
    with pytest.raises(
        InputError, match=r"^recipe: experts: none; expected at least one\. Give --expert NAME=MODEL\.$"
    ):
        MergeRecipe("org/seed", {}, seed_expert=seed_expert)
    assert MergeRecipe("org/seed", {}, num_experts_per_tok=1).experts == {}  # the seed alone, if one insists


def test_as_many_experts_per_token_as_there_are() -> None:
    assert MergeRecipe("s", {"a": "b"}, num_experts_per_tok=2).num_experts_per_tok == 2
    split = MergeRecipe("s", {"a": "b"}, expert_mode="split", num_chunks=3, num_experts_per_tok=6)
    assert split.num_experts_per_tok == 6
    with pytest.raises(InputError, match=r"7; expected in \[1, 6\], for there are 6 experts"):
        dataclasses.replace(split, num_experts_per_tok=7)
    with pytest.raises(InputError, match=r"num_experts_per_tok: 2; expected 1, for there is 1 expert\. "):
        MergeRecipe("s", {"a": "b"}, seed_expert=False)


@pytest.mark.parametrize("combine", ["mean", "seed"])
def test_weights_that_would_be_ignored(combine: str) -> None:
    with pytest.raises(InputError, match=f"weights, which combine: {combine} ignores. Say combine: weighted"):
        MergeRecipe("s", {"a": ExpertSpec("b", weight=2.0)}, combine=combine)
    assert MergeRecipe("s", {"a": ExpertSpec("b", weight=2.0)}, combine="weighted").experts["a"].weight == 2.0


def test_weights_that_are_all_zero() -> None:
    with pytest.raises(InputError, match="recipe: weight: all are 0; expected at least one above 0"):
        MergeRecipe("s", {"a": ExpertSpec("b", weight=0)}, seed_weight=0, combine="weighted")


def test_folders_in_a_file_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = tmp_path / "room"
    for folder in ("room/models/code", "room/org/name", "seed", "elsewhere/only-here", "elsewhere/models/code"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    (room / "merge.yaml").write_text(
        """
seed: ../seed
experts:
  code: models/code
  folder: org/name
  hub: org/other@main
  gone: ./only-here
  base: {model: ./models/code, base: ../seed, weight: 2.0}
combine: weighted
"""
    )
    recipe = MergeRecipe.from_yaml(room / "merge.yaml")
    assert recipe.seed == str(tmp_path / "seed")
    assert {name: spec.model for name, spec in recipe.experts.items()} == {
        "code": str(room / "models/code"),
        "folder": str(room / "org/name"),
        "hub": "org/other@main",
        "gone": str(room / "only-here"),  # not the folder that happens to lie where the command is run
        "base": str(room / "models/code"),
    }
    assert recipe.experts["base"].base == str(tmp_path / "seed")
    monkeypatch.chdir(room)
    assert MergeRecipe.from_yaml("merge.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed: [", "unreadable: while parsing"),
        ("", "no keys; expected at least `seed:` and `experts:`"),
        ("- a\n- b\n", "no keys; expected at least `seed:` and `experts:`"),
        ("seed: \x07", "unreadable: unacceptable character"),
        ("seed: a\nexperts:\n  x: 1\n  y: 2\n  x: 3\n", "unreadable: the key x stands there twice"),
        ("!!python/object/apply:os.mkdir [made]\n", "unreadable: could not determine a constructor for the tag"),
    ],
)
def test_unreadable_files(text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("merge.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_recipe_file("merge.yaml")
    assert str(caught.value).startswith(f"recipe: merge.yaml: {reason}")
    assert "\n" not in str(caught.value)
    assert not Path("made").exists()


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^recipe: .*nowhere\.yaml: No such file or directory$"):
        read_recipe_file(tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match="Is a directory"):
        read_recipe_file(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xff\xfe\n")
    with pytest.raises(InputError, match="unreadable: "):
        read_recipe_file(tmp_path / "latin.yaml")


def test_what_a_merge_wrote_about_itself_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "btx_recipe.yaml").write_text("seed: org/s\nexperts: {a: org/a}\nresolved: {tools: {python: '3'}}\n")
    assert MergeRecipe.from_yaml(tmp_path / "btx_recipe.yaml") == MergeRecipe("org/s", {"a": "org/a"})


FLAGS = [
    *("--seed", "org/seed@v1", "--expert", "code=org/code", "--expert", "lora-1.b=./math", "--weight", "code=2"),
    *("--weight", "lora-1.b=0", "--weight", "seed=0.5", "--base", "lora-1.b=org/other", "--no-seed-expert"),
    *("--combine", "ties", "--density", "0.5", "--scale", "-0.5", "--expert-mode", "split", "--num-chunks", "3"),
    *("--fold-norms", "--router-init", "ridge", "--router-std", "0.1", "--random-seed", "7"),
    *("--domain-text", "code=org/text:2", "--domain-text", "code=more.txt", "--domain-text", "lora-1.b=b/*.parquet"),
    *("--domain-tokens", "1000", "--router-ridge", "0.5", "--regmean-ridge", "0.25", "--fit-through", "router"),
    *("--router-type", "switch", "--router-pre-softmax"),
    *("--num-experts-per-tok", "6", "--router-aux-loss-coef", "0", "--dtype", "float16"),
    *("--max-shard-size", "500MiB", "--tokenizer-source", "code", "--untie", "--allow-nonfinite", "--allow-unrelated"),
]


def test_flags_alone_say_all_that_a_file_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recipe_by_command(monkeypatch, *FLAGS).to_dict() == FULL


def test_flags_win_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text(
        """
seed: org/file-seed
experts:
  a: org/a
  b: {model: org/b, weight: 3.0}
combine: weighted
fold_norms: true
seed_expert: false
density: 0.3
"""
    )
    plain = recipe_by_command(monkeypatch, "--recipe", str(file))
    assert plain == MergeRecipe(
        "org/file-seed",
        {"a": ExpertSpec("org/a"), "b": ExpertSpec("org/b", 3.0)},
        combine="weighted",
        fold_norms=True,
        seed_expert=False,
        density=0.3,
    )
    flags = ["--seed", "org/flag-seed", "--expert", "b=org/new-b", "--expert", "c=./c", "--weight", "a=0.5"]
    mixed = recipe_by_command(monkeypatch, "--recipe", str(file), *flags, "--seed-expert", "--density", "0.9")
    assert mixed == MergeRecipe(
        "org/flag-seed",
        {"a": ExpertSpec("org/a", 0.5), "b": ExpertSpec("org/new-b", 3.0), "c": ExpertSpec("./c")},
        combine="weighted",
        fold_norms=True,
        seed_expert=True,
        density=0.9,
    )


def test_keywords_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text("seed: org/s\nexperts: {a: org/a}\ndtype: float16\n")
    assert MergeRecipe.from_yaml(file, dtype="float32").dtype == "float32"


def test_a_wrong_flag_is_called_as_it_was_typed() -> None:
    lines = refused_by_command(
        *("--expert", "a=org/a", "--density", "7", "--combine", "slerp", "--expert-mode", "half"),
        *("--weight", "a=-1", "--weight", "seed=-2", "--weight", "b=1", "--base", "c=x", "--expert", "seed=x"),
    )
    assert lines == [
        "error: command: --weight: no expert b; expected one of a, seed",
        "error: command: --base: no expert c; expected one of a, seed",
        "error: command: --weight a: -1.0; expected a number, at least 0",
        "error: command: --expert: the name 'seed'; expected letters, digits, `_`, `-`, `.`; not `seed`, "
        "which is the seed's own",
        "error: command: seed: missing; expected the model that all experts grew from",
        "error: command: --weight seed: -2.0; expected a number, at least 0",
        f"error: command: --combine: 'slerp'; expected one of {METHODS}",
        "error: command: --density: 7.0; expected in (0, 1]",
        "error: command: --expert-mode: 'half'; expected one of whole, split, blend",
    ]


def test_a_wrong_key_of_the_file_is_called_by_the_file_and_the_key(tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text("seed: org/s\nexperts: {a: org/a}\ndensty: 1\nscale: .nan\n")
    assert refused_by_command("--recipe", str(file), "--num-chunks", "0") == [
        f"error: {file}: densty: unknown key. Did you mean density?",
        f"error: {file}: scale: nan; expected a finite number",
        "error: command: --num-chunks: 0; expected at least 1",
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--expert", "code"], "command: --expert: code; expected NAME=VALUE, such as code=./llama-code"),
        (["--expert", "=x"], "command: --expert: =x; expected NAME=VALUE, such as code=./llama-code"),
        (["--expert", "a=x", "--expert", "a=y"], "command: --expert: a is given twice; expected each name once"),
        (["--expert", "a=x", "--weight", "a=b"], "command: --weight: a=b; expected a number"),
    ],
)
def test_wrong_pairs(arguments: list[str], line: str) -> None:
    assert refused_by_command("--seed", "org/s", *arguments) == [f"error: {line}"]


@pytest.mark.parametrize("experts", ["[a, b]", "text", "{1: org/a}", "{a: 5}", "{a: [x]}", "{a: {model: {x: y}}}"])
def test_odd_experts_in_a_file_are_a_refusal_and_no_traceback(experts: str, tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text(f"seed: org/s\nexperts: {experts}\n")
    (line,) = refused_by_command("--recipe", str(file), "--expert", "b=org/b")
    assert line.startswith(f"error: {file}: experts") or line.startswith("error: command: --expert")
