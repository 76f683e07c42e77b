"""Every field of every recipe, given any plain value, is taken or refused by an InputError that can be printed."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import pytest

from btx_merge import BranchRecipe, EditRecipe, EvalRecipe, FitRecipe, InputError, MergeRecipe, TrainRecipe

RECIPES: dict[Any, dict[str, Any]] = {
    BranchRecipe: {"model": "seed", "data": {"code": "code.txt"}},
    EditRecipe: {"model": "merged"},
    EvalRecipe: {"model": "merged", "data": {"code": "code.txt"}},
    FitRecipe: {"model": "merged"},
    MergeRecipe: {"seed": "seed", "experts": {"code": "code"}},
    TrainRecipe: {"model": "merged", "data": {"code": "code.txt"}},
}
NUMBERS = [True, -1, 0, 1.5, float("nan"), float("inf"), float("-inf"), 10**400, 10**5000, -(10**400)]
TEXTS = ["", "x", "\ud800", "a\n\x1b[31m", "9" * 500 + "GB", b"x"]
LISTS: list[Any] = [[], [1], ["x"], [["a", "b"]], (1, 2), [None]]
MAPPINGS = [{}, {1: 2}, {"a": None}, {"a": 1}, {"a": "b"}, {"a": [1]}, {"a": {"model": 1}}, {"a": {"references": 3}}]
OTHERS = [None, datetime.date(2026, 2, 28), object()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_any_plain_value_for_any_field(recipe):
    refusals = []
    for field in dataclasses.fields(recipe):
        for value in [*NUMBERS, *TEXTS, *LISTS, *MAPPINGS, *OTHERS]:
            try:
                recipe(**{**RECIPES[recipe], field.name: value})
            except InputError as error:
                refusals.append(error)
    assert len(refusals) > 10 * len(dataclasses.fields(recipe))
    for error in refusals:
        assert all(line.isprintable() for line in str(error).split("\n"))
        assert all(problem.where for problem in error.problems)
