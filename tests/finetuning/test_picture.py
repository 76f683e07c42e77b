"""The picture of a finetuning: one quantity a panel, and no legend over a curve."""

from __future__ import annotations

from typing import Any

import pytest

from btx_merge.finetuning.picture import figure_of, smoothed

EXPERTS = ["seed", "code", "mathematics", "encyclopedia"]


def history_of(steps: int, *left_out: str) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = [{"step": 0, "eval_perplexity/code": 130.0, "eval_perplexity/math": 9000.0}]
    for step in range(1, steps + 1):
        entry = {"step": step, "loss": 5 - step / steps, "aux_loss": 1.2, "learning_rate": 1e-4 / step}
        entry |= {"perplexity/code": 100.0, "perplexity/math": float("inf") if step == 1 else 8000.0}
        entry |= {f"load/{name}": 0.25 for name in EXPERTS}
        history.append(entry | {"load_per_layer": [[0.4, 0.2, 0.2, 0.2], [0.1, 0.5, 0.2, 0.2]]})
    return [{key: value for key, value in entry.items() if key not in left_out} for entry in history]


@pytest.mark.parametrize("steps", [1, 5, 200])
def test_a_quantity_a_panel(steps: int) -> None:
    panels = {ax.get_title(): ax for ax in figure_of(history_of(steps), EXPERTS).axes if ax.get_title()}
    loss, balance, rate, perplexity, load, layers = panels.values()
    for ax, key in ((loss, "loss"), (balance, "aux_loss"), (rate, "learning_rate")):
        assert list(ax.lines[0].get_ydata()) == [entry[key] for entry in history_of(steps)[1:]]
    assert [len(ax.lines) for ax in (loss, balance, rate)] == ([2, 2, 1] if steps > 20 else [1, 1, 1])
    if steps > 20:  # pale and raw, smoothed over it
        assert loss.lines[0].get_alpha() == 0.25
        assert list(loss.lines[1].get_ydata()) == smoothed([entry["loss"] for entry in history_of(steps)[1:]])
    assert perplexity.get_yscale() == "log"
    assert [text.get_text() for text in perplexity.get_legend().get_texts()] == ["code", "math", "held out"]
    assert [text.get_text() for text in load.get_legend().get_texts()] == [*EXPERTS, "ideal"]
    assert layers.images[0].get_array().shape == (4, 2)


def test_no_legend_over_a_curve() -> None:
    figure = figure_of(history_of(200), EXPERTS)
    figure.draw_without_rendering()
    panels = [ax.get_window_extent() for ax in figure.axes]
    legends = [ax.get_legend().get_window_extent() for ax in figure.axes if ax.get_legend()]
    assert len(legends) == 2
    assert not any(legend.overlaps(panel) for legend in legends for panel in panels)
    assert all(figure.bbox.contains(*corner) for legend in legends for corner in legend.corners())


def test_what_was_not_logged() -> None:
    panels = figure_of(history_of(5, "aux_loss", "load_per_layer"), EXPERTS).axes
    assert [text.get_text() for text in panels[1].texts] == ["not logged"]
    assert not panels[5].images


def test_smoothed() -> None:
    """By hand: of 80 values, the two neighbours on each side count; a straight line stays one."""
    values = [0.0] * 40 + [5.0] + [0.0] * 39
    assert smoothed(values) == [0.0] * 38 + [1.0] * 5 + [0.0] * 37
    assert smoothed([1.0, 2.0, 6.0]) == [1.5, 3.0, 4.0]
