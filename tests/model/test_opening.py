"""What keeps every verb from a merged model, before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from btx_merge import (
    EditRecipe,
    FitRecipe,
    InputError,
    RoutingRecipe,
    TrainRecipe,
    edit,
    export,
    extract,
    fit,
    routing,
    train,
)
from tests.finetuning.test_run import ARGUMENTS
from tests.support.common import edit_json, files_of, problems_of

VERBS: dict[str, Callable[[str, dict[str, str], Path], Any]] = {
    "train": lambda model, texts, out: train(TrainRecipe(model, texts, arguments=ARGUMENTS), out),
    "fit": lambda model, texts, out: fit(FitRecipe(model, domain_text=texts), out),
    "edit": lambda model, texts, out: edit(EditRecipe(model, rename={"code": "python"}), out),
    "export": lambda model, texts, out: export(model, out),
    "extract": lambda model, texts, out: extract(model, "code", out),
    "routing": lambda model, texts, out: routing(RoutingRecipe(model, texts), out),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_generation_config_that_transformers_refuses(verb, merged, texts, tmp_path):
    """It would load neither the model nor what is made of it."""
    model = shutil.copytree(merged, tmp_path / "model")
    edit_json(model / "generation_config.json", early_stopping="maybe")
    before = files_of(tmp_path)
    with pytest.raises(InputError) as caught:
        VERBS[verb](str(model), texts, tmp_path / "out")
    (problem,) = caught.value.problems
    assert (problem.source, problem.where) == ("model", "generation_config.json: early_stopping")
    assert problem.expected == 'true, false or "never"'
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"router_grad": "dens"}, "ValueError: router_grad is 'dens'; expected one of sparse, dense)"),
        ({"layer_types": ["x"]}, "`layer_types` entries must be in"),
        ({"id2label": 5}, "AttributeError: "),
        ({"dtype": "float99"}, "no attribute 'float99'"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "fit"])
def test_a_config_that_the_models_code_refuses(verb, changes, said, merged, texts, tmp_path):
    """People change it by hand: how the model routes is read from there."""
    model = shutil.copytree(merged, tmp_path / "model")
    edit_json(model / "config.json", **changes)
    (line,) = problems_of(VERBS[verb], str(model), texts, tmp_path / "out")
    assert line.startswith("model: config.json: refused by the model's code (")
    assert said in line
    assert line.endswith("). Correct the file.")
    assert not list(tmp_path.glob("out*"))
