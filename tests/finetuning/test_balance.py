"""The balancing loss of `btx train` by default: the model's, unless its routers were fitted."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from btx_merge import MergeRecipe, fit, merge
from btx_merge.finetuning.run import train
from btx_merge.fitting.recipe import FitRecipe
from tests.finetuning.test_run import recipe
from tests.support.common import Told

NOTE = "no balancing loss: the routers were fitted. --router-aux-loss-coef 0.01 balances them all the same."
PROMPTS = {"code": ("w1 w2 w3",), "math": ("w70 w71",), "seed": ("w30 w90",)}


@pytest.fixture(scope="module")
def fitted(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted") / "merged"
    merge(MergeRecipe(str(family.seed), family.experts, router_init="prompts", prompts=PROMPTS), folder)
    return folder


def trained(model: Any, texts: dict[str, str], out: Any, **changes: Any) -> tuple[float, list[str], list[str]]:
    """The coefficient that the record says, the notes, and the head of the console's table."""
    notes: list[str] = []
    lines: list[str] = []
    asked = recipe(model, texts, train="routers", arguments={"max_steps": 1}, **changes)
    train(asked, out, reporter=Told(note=notes.append, line=lines.append))
    coefficient = yaml.safe_load((out / "btx_recipe.yaml").read_text())["training"][-1]["router_aux_loss_coef"]
    return coefficient, notes, next(line for line in lines if "ppl code" in line).split()


def test_fitted_routers_are_not_balanced_unless_asked(fitted, texts, tmp_path):
    coefficient, notes, head = trained(fitted, texts, tmp_path / "out")
    assert (coefficient, notes) == (0, [NOTE])
    assert "balancing" not in head
    coefficient, notes, _ = trained(tmp_path / "out", texts, tmp_path / "again")  # trained, and never balanced
    assert (coefficient, notes) == (0, [NOTE])
    coefficient, notes, head = trained(fitted, texts, tmp_path / "asked", router_aux_loss_coef=0.02)
    assert (coefficient, notes) == (0.02, [])
    assert "balancing" in head
    coefficient, notes, _ = trained(tmp_path / "asked", texts, tmp_path / "on")  # balanced once, and so on
    assert (coefficient, notes) == (0.01, [])
    assert '"router_aux_loss_coef": 0.01' in (tmp_path / "out/config.json").read_text()


def test_random_routers_are_balanced_until_they_are_fitted(merged, texts, tmp_path):
    coefficient, notes, _ = trained(merged, texts, tmp_path / "out")
    assert (coefficient, notes) == (0.01, [])
    fit(FitRecipe(str(merged), method="prompts", prompts=PROMPTS), tmp_path / "fitted")
    coefficient, notes, _ = trained(tmp_path / "fitted", texts, tmp_path / "then")
    assert (coefficient, notes) == (0, [NOTE])
