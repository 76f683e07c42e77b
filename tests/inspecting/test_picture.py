"""The picture: a column a domain, a row a quantity, and the figures in its bars."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from btx_merge.inspecting.figures import ModelFigures
from btx_merge.inspecting.picture import COLORS, figure_of
from tests.inspecting.test_figures import domain_of

SHARE = [(0.6, 0.4), (0.3, 0.7)]
WEIGHT = ((0.8, 0.2), (0.1, 0.9))


def model_of(name: str = "merged", experts: tuple[str, ...] = ("seed", "code")) -> ModelFigures:
    domains = tuple(domain_of(domain, SHARE, weight=WEIGHT) for domain in ("code", "math", "law"))
    return ModelFigures(name, "top_k", experts, domains)


def test_bars_are_the_figures() -> None:
    axes = figure_of([model_of()]).axes
    assert [ax.get_title() for ax in axes] == ["code", "math", "law", "", "", ""]
    for ax, grid in [*((ax, SHARE) for ax in axes[:3]), *((ax, WEIGHT) for ax in axes[3:])]:
        for column, bars in enumerate(ax.containers):
            assert [bar.get_height() for bar in bars] == pytest.approx([row[column] for row in grid])
            assert [bar.get_y() for bar in bars] == pytest.approx([sum(row[:column]) for row in grid])


def test_two_models_have_rows_of_their_own_and_one_colour_an_expert() -> None:
    figure = figure_of([model_of("after"), model_of("before", ("code", "bio"))])
    labels = [ax.get_ylabel() for ax in figure.axes[::3]]
    assert labels == [
        f"{name}\n{kind}" for name in ("after", "before") for kind in ("share of tokens", "mean gate weight")
    ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["seed", "code", "bio"]
    code = [figure.axes[0].containers[1], figure.axes[6].containers[0]]
    assert code[0][0].get_facecolor() == code[1][0].get_facecolor()


def test_long_names_of_models_stay_beside_their_rows() -> None:
    figure = figure_of([model_of("finetuned-with-a-name-that-is-long"), model_of("w" * 60)])
    figure.draw_without_rendering()
    boxes = [ax.yaxis.label.get_window_extent() for ax in figure.axes[::3]]
    for above, below in pairwise(boxes):
        assert below.y1 < above.y0


def test_the_page_has_the_same_colours() -> None:
    page = Path(figure_of.__code__.co_filename).with_name("page.html").read_text(encoding="utf-8")
    light = dict(re.findall(r"--(x\d): (#[0-9a-f]{6});", page.split("@media")[0]))
    assert [light[f"x{number}"].upper() for number in range(8)] == [color.upper() for color in COLORS]


@pytest.mark.usefixtures("painted")
def test_names_are_no_formulas_and_of_bounded_length(tmp_path: Path) -> None:
    model = model_of("m", ("$\\frac", "x" * 5000 + "\x1b[2J"))
    figure = figure_of([model])
    figure.savefig(tmp_path / "routing.svg")
    assert max(len(text.get_text()) for text in figure.legends[0].get_texts()) < 60
    assert "\x1b" not in (tmp_path / "routing.svg").read_text()


def test_more_experts_than_colours_differ_by_hatches() -> None:
    names = tuple(f"e{number}" for number in range(10))
    domain = domain_of("code", [(0.1,) * 10])
    figure = figure_of([ModelFigures("m", "top_k", names, (domain,))])
    styles = [(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in figure.axes[0].containers]
    assert len(set(styles)) == 10
