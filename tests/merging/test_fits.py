"""Text alone asks for the best fit, and what is given beside it wins; who says what is fitted gets that, as ever."""

import copy
import dataclasses
import pickle

import pytest
import yaml

from btx_merge import InputError, MergeRecipe, merge
from btx_merge.merging.template import recipe_template
from tests.fitting.test_run import recipe_of, write_texts
from tests.support.common import assert_complete, files_of, grow, save_seed, tensors_of

BEST = {
    "combine": "regmean_merged",
    "head": "fitted",
    "router_init": "logistic",
    "fit_through": "router",
}
PLAIN = {"combine": "mean", "head": "combined", "router_init": "random", "fit_through": "expert"}
ROUTERS = {key: BEST[key] for key in ("router_init", "fit_through")}
SHARED = {key: BEST[key] for key in ("combine", "head")}


def fit_of(**values) -> dict:
    recipe = MergeRecipe.from_dict({"seed": "s", "experts": {"code": "a"}, **values})
    same = MergeRecipe("s", {"code": "a"}, **values)
    assert recipe == same
    return {key: getattr(recipe, key) for key in BEST}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, BEST),
        ({"regmean_ridge": 0.1, "domain_tokens": 500}, BEST),
        ({"head": "combined"}, BEST | {"head": "combined"}),
        ({"fit_through": "expert"}, BEST | {"fit_through": "expert"}),
        ({"combine": "mean"}, PLAIN | ROUTERS),
        ({"combine": "ties"}, PLAIN | ROUTERS | {"combine": "ties"}),
        ({"router_init": "random"}, PLAIN | SHARED),
        # these have said what is fitted since there were fits, and mean the same still
        ({"router_init": "ridge"}, PLAIN | {"router_init": "ridge"}),
        ({"combine": "regmean_merged"}, PLAIN | {"combine": "regmean_merged"}),
        ({"combine": "regmean", "router_init": "ridge"}, PLAIN | {"combine": "regmean", "router_init": "ridge"}),
    ],
)
def test_what_is_given_wins(given, found):
    assert fit_of(domain_text={"code": "code.jsonl"}, **given) == found


def test_without_text_nothing_is_fitted():
    assert fit_of() == PLAIN
    assert fit_of(router_init="prompts", prompts={"code": "x"}) == PLAIN | {"router_init": "prompts"}


def test_text_that_nothing_is_to_be_fitted_on_is_refused_still():
    with pytest.raises(InputError, match=r"nothing is fitted on it. Leave out combine or router_init"):
        fit_of(domain_text={"code": "code.jsonl"}, combine="mean", router_init="random")


def test_copies_are_equal():
    recipe = MergeRecipe("s", {"code": "a"}, domain_text={"code": "code.jsonl"})
    for same in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe)), dataclasses.replace(recipe)):
        assert same == recipe
        assert same.to_dict() == recipe.to_dict()


def test_a_recipe_to_start_from_says_what_would_be_done():
    given = {"domain_text": {"code": "code.jsonl"}, "head": "combined"}
    printed = yaml.safe_load(recipe_template(given))
    assert {key: printed[key] for key in BEST} == BEST | {"head": "combined"}
    assert {key: value for key, value in yaml.safe_load(recipe_template({})).items() if key in BEST} == PLAIN


@pytest.mark.parametrize("tied", [True, False])
def test_a_merge_with_text_is_the_one_that_is_spelled_out(tmp_path, tied):
    """Tied or not, the result has a head of its own; its record names every choice, and gives it again."""
    save_seed(tmp_path / "seed", tie_word_embeddings=tied)
    for number, name in enumerate(("code", "math")):
        grow(tmp_path / "seed", tmp_path / name, noise=0.5, random_seed=number + 1)
    texts = write_texts(tmp_path)
    merge(recipe_of(tmp_path, texts), tmp_path / "short")
    merge(recipe_of(tmp_path, texts, **BEST), tmp_path / "long")
    assert files_of(tmp_path / "short") == files_of(tmp_path / "long")
    recorded = yaml.safe_load((tmp_path / "short/btx_recipe.yaml").read_text())
    assert {key: recorded[key] for key in BEST} == BEST
    assert_complete(tmp_path / "short")
    assert "lm_head.weight" in tensors_of(tmp_path / "short")
    merge(MergeRecipe.from_yaml(tmp_path / "short", domain_text=texts), tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "short")
