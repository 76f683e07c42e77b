"""The picture of a model's routing, as in figures 3 and 4 of the paper: a panel a domain, a bar a layer.

Legend: E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

from btx_merge.inspecting.figures import DomainFigures, Grid, ModelFigures
from btx_merge.reporting import printable

COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#F0E442", "#8A8F98")
"""Of Okabe and Ito, with a grey for their black: all kinds of colour vision tell them apart. The page has the same."""
_HATCHES = ("", "//", "..", "xx")
"""For the experts after those for which there are colours."""
_KINDS = {"share": "share of tokens", "weight": "mean gate weight"}
_MOST_NAME = 40
_LINE_OF_A_LABEL = 22
"""Letters beside a row of panels, at most: more would run into the next row's."""


def figure_of(models: Sequence[ModelFigures]) -> Any:
    """Return a figure with a column for each domain, and for each model a row of shares and one of gate weights."""
    from matplotlib.figure import Figure

    names = expert_names(models)
    domains = models[0].domains
    rows = [(model, kind) for model in models for kind in _KINDS]
    size = (2.2 + 3.1 * len(domains), 0.9 + 2.3 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), len(domains), squeeze=False, sharex="row", sharey="row")
    for axes, (model, kind) in zip(grid, rows, strict=True):
        for ax, domain in zip(axes, model.domains, strict=True):
            _bars(ax, model, _values(domain, kind), names)
            if ax in grid[0]:
                ax.set_title(_plain(domain.domain), fontsize=12, fontweight="bold")
            if ax in grid[-1]:
                ax.set_xlabel("layer")
        label = wrap(_plain(model.model), _LINE_OF_A_LABEL) if len(models) > 1 else []
        axes[0].set_ylabel("\n".join([*label, _KINDS[kind]]))
    handles, labels = [], []
    for name in names:
        handles.append(_patch(name, names))
        labels.append(_plain(name))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 6), frameon=False)
    figure.suptitle(_plain(f"Who gets which tokens: {models[0].model}") if len(models) == 1 else "")
    return figure


def expert_names(models: Sequence[ModelFigures]) -> list[str]:
    """Return the experts of all models, each once: an expert has one colour in all of them."""
    return list(dict.fromkeys(name for model in models for name in model.experts))


def _values(domain: DomainFigures, kind: str) -> Grid:
    return domain.share if kind == "share" else domain.weight


def _bars(ax: Any, model: ModelFigures, grid: Grid, names: Sequence[str]) -> None:
    """Stack a bar of each layer's values, [L, E], expert by expert."""
    bottom = [0.0] * len(grid)
    for column, name in enumerate(model.experts):
        heights = [row[column] for row in grid]
        color, hatch = _style(name, names)
        ax.bar(range(len(grid)), heights, 0.82, bottom, color=color, hatch=hatch, edgecolor="white", linewidth=0.6)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    ax.set_ylim(0, max(1.0, *bottom))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _style(name: str, names: Sequence[str]) -> tuple[str, str]:
    number = names.index(name)
    return COLORS[number % len(COLORS)], _HATCHES[number // len(COLORS) % len(_HATCHES)]


def _patch(name: str, names: Sequence[str]) -> Any:
    from matplotlib.patches import Patch

    color, hatch = _style(name, names)
    return Patch(facecolor=color, hatch=hatch, edgecolor="white")


def _plain(name: str) -> str:
    """Return a name on one line, of bounded length, and without what matplotlib would take for a formula."""
    return printable(name, _MOST_NAME).replace("$", r"\$")
