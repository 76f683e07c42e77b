"""What follows from the figures, by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from btx_merge.cli.display import print_routing
from btx_merge.inspecting.figures import DomainFigures, ModelFigures, WorstToken
from btx_merge.inspecting.run import RoutingReport


def domain_of(name: str, share: list[tuple[float, ...]], **changes: Any) -> DomainFigures:
    values = {
        "tokens": 10,
        "routed": 9,
        "loss": 2.0,
        "first": tuple(share),
        "weight": tuple(share),
        "entropy": (0.5,) * len(share),
        "without": {},
        "alone": {},
        "regret": None,
    }
    return DomainFigures(name, share=tuple(share), **{**values, **changes})


def test_load_counts_each_domain_alike() -> None:
    one = domain_of("code", [(1.0, 0.0, 0.0), (0.5, 0.5, 0.0)], tokens=1000)
    other = domain_of("bio", [(0.5, 0.496, 0.004), (0.5, 0.42, 0.08)], tokens=10)
    figures = ModelFigures("m", "top_k", ("code", "seed", "bio"), (one, other))
    for row, expected in zip(figures.load, [(0.75, 0.248, 0.002), (0.5, 0.46, 0.04)], strict=True):
        assert row == pytest.approx(expected)
    dead, cold = figures.neglected  # an ideal share is a third
    assert (dead.layer, dead.expert, dead.load, dead.is_dead) == (0, "bio", 0.002, True)
    assert (cold.layer, cold.expert, cold.load, cold.is_dead) == (1, "bio", 0.04, False)


def test_neglected_experts_are_told_with_their_layers(capsys: pytest.CaptureFixture[str]) -> None:
    share = [(0.997, 0.002, 0.001), (0.96, 0.0, 0.04), (0.9, 0.04, 0.06)]
    figures = ModelFigures("m", "top_k", ("code", "law", "bio"), (domain_of("code", share),))
    print_routing(RoutingReport(Path("out"), figures, None, 1.0))
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith(("dead", "cold"))] == [
        "dead  law in layers 0, 1 of m: at most 0.20% of the choices",
        "dead  bio in layer 0 of m: 0.10% of the choices",
        "cold  law in layer 2 of m: 4.00% of the choices",
        "cold  bio in layers 1, 2 of m: at most 6.00% of the choices",
    ]


def test_a_second_model_stands_in_the_table_and_what_was_not_measured_does_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    share = [(0.25, 0.75)]
    whole = domain_of("code", share, without={"seed": 2.5}, alone={"code": 1.5}, regret=0.25)
    after = ModelFigures("after", "top_k", ("seed", "code"), (whole,))
    before = ModelFigures("before", "top_k", ("seed", "code"), (domain_of("code", share, loss=3.0),))

    def table(model: ModelFigures, against: ModelFigures | None) -> list[list[str]]:
        """Cells by row, the head's first."""
        print_routing(RoutingReport(Path("out"), model, against, 1.0))
        lines = [line.strip() for line in capsys.readouterr().out.split("written")[0].splitlines()]
        return [re.split("  +", line) for line in lines if line and "─" not in line]

    head = ["domain", "tokens", "loss", "own expert first"]
    assert table(before, None) == [head, ["code", "10", "3.000", "75%"]]
    worth = ["1.500 (code)", "+0.500 without seed", "0.250"]
    assert table(after, before) == [
        ["model", *head, "best alone", "worth most", "regret"],
        ["after", "code", "10", "2.000", "75%", *worth],
        ["before", "code", "10", "3.000", "75%"],
    ]


def test_own_expert_first() -> None:
    one, other = domain_of("code", [(0.2, 0.8)]), domain_of("law", [(0.2, 0.8)])
    figures = ModelFigures("m", "top_k", ("seed", "code"), (one, other))
    assert figures.own_first(one) == (0.8,)
    assert figures.own_first(other) is None
    plain = figures.to_dict()
    assert [domain["own_first"] for domain in plain["domains"]] == [(0.8,), None]


def test_figures_are_plain_values() -> None:
    worst = WorstToken("a", "b", "c", 3.0, "code", 1.0)
    domain = domain_of("code", [(0.2, 0.8)], without={"seed": 2.5}, alone={"seed": 2.0}, regret=0.1, worst=(worst,))
    plain = json.loads(json.dumps(ModelFigures("m", "top_k", ("seed", "code"), (domain,)).to_dict()))
    assert plain["domains"][0]["worst"][0] == pytest.approx(vars(worst))
    assert plain["domains"][0]["without"] == {"seed": 2.5}
