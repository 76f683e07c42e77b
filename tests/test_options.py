"""What all verbs have in common: their options, whom they tell how it goes, and reports as plain values."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

import btx_merge
from btx_merge import (
    BranchRecipe,
    EditRecipe,
    EvalRecipe,
    FitRecipe,
    InputError,
    MergeRecipe,
    Options,
    Reporter,
    RoutingRecipe,
    TrainRecipe,
    branch,
    check,
    edit,
    evaluate,
    export,
    extract,
    fit,
    merge,
    routing,
    train,
)
from tests.support.common import Told

VERBS = {
    "branch": lambda out, options: branch(BranchRecipe("m", {"a": "t"}, arguments={"max_steps": 1}), out, options),
    "merge": lambda out, options: merge(MergeRecipe("s", {"a": "b"}), out, options),
    "check": lambda out, options: check(MergeRecipe("s", {"a": "b"}), out, options),
    "fit": lambda out, options: fit(FitRecipe("m", method="prompts", prompts={"a": ["x"]}), out, options),
    "edit": lambda out, options: edit(EditRecipe("m", ("a",)), out, options),
    "export": lambda out, options: export("m", out, options),
    "extract": lambda out, options: extract("m", "a", out, options),
    "routing": lambda out, options: routing(RoutingRecipe("m", {"a": "t"}), out, options),
    "evaluate": lambda out, options: evaluate(EvalRecipe("m", {"a": "t"}), out, options),
    "train": lambda out, options: train(TrainRecipe("m", {"a": "t"}, arguments={"max_steps": 1}), out, options),
}


@pytest.mark.parametrize(
    ("verb", "option", "found"),
    [
        ("merge", Options(max_shard_size="1GB"), "max_shard_size: '1GB', which merge has no use for; expected only"),
        ("check", Options(max_shard_size="1GB"), "max_shard_size: '1GB', which merge has no use for"),
        ("fit", Options(max_shard_size="1GB"), "max_shard_size: '1GB', which fit has no use for"),
        ("edit", Options(statistics="there"), "statistics: 'there', which edit has no use for"),
        ("export", Options(device="cuda"), "device: 'cuda', which export has no use for"),
        ("extract", Options(device="cuda"), "device: 'cuda', which extract has no use for"),
        ("routing", Options(workers=2), "workers: 2, which routing has no use for; expected only overwrite, device"),
        ("evaluate", Options(workers=2), "workers: 2, which evaluate has no use for; expected only device, overwrite"),
        ("branch", Options(device="cpu"), "device: 'cpu', which branch has no use for; expected only overwrite"),
        (
            "train",
            Options(device="cpu"),
            "device: 'cpu', which train has no use for; expected only overwrite, workers",
        ),
    ],
)
def test_an_option_that_a_verb_would_pass_over_is_refused(
    tmp_path: Path, verb: str, option: Options, found: str
) -> None:
    with pytest.raises(InputError) as error:
        VERBS[verb](tmp_path / "out", option)
    (problem,) = error.value.problems
    assert str(problem).startswith(f"options: {found}")
    assert list(tmp_path.iterdir()) == []


def test_verbs_are_called_alike() -> None:
    for name in ("merge", "edit", "evaluate", "fit", "export", "extract", "routing", "train"):
        parameters = inspect.signature(getattr(btx_merge, name)).parameters
        assert parameters["options"].default == Options()
        assert type(parameters["reporter"].default) is Reporter
        assert "reporter" in list(parameters)[3:5]


def test_a_reporter_hears_of_a_merge(family, tmp_path: Path) -> None:
    heard: list[tuple[str, int]] = []
    warned: list[str] = []
    reporter = Told(
        started=lambda nbytes: heard.append(("started", nbytes)),
        bytes_done=lambda nbytes: heard.append(("done", nbytes)),
        warn=warned.append,
    )
    twins = {"code": str(family.code), "twin": str(family.code)}
    report = merge(MergeRecipe(str(family.seed), twins), tmp_path / "out", reporter=reporter)
    (kind, total), *done = heard
    assert kind == "started"
    assert {kind for kind, _ in done} == {"done"}
    assert sum(nbytes for _, nbytes in done) == total > 0
    assert warned == [str(warning) for warning in report.checked.warnings]
    assert warned


def test_reports_are_plain_values(family, tmp_path: Path) -> None:
    merged, fitted = tmp_path / "merged", tmp_path / "fitted"
    recipe = MergeRecipe(str(family.seed), family.experts)
    prompts = FitRecipe(str(merged), method="prompts", prompts={name: ["w1 w2"] for name in family.experts})
    reports = [check(recipe), merge(recipe, merged), fit(prompts, fitted), export(str(fitted), tmp_path / "mixtral")]
    for report in reports:
        assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert set(reports[2].to_dict()) == {"output", "seconds", "layers", "losses"}
