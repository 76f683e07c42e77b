"""The picture of a finetuning, with a panel for each quantity that was logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from btx_merge.finetuning.metrics import HELD_OUT, LOAD_PER_LAYER

_FEW = 20
"""Points of a curve up to which it is shown as it is; longer ones get a smoothed line over a pale raw one."""
_WIDE = 10
"""Ratio of the largest to the smallest perplexity from which they stand on a logarithmic axis."""


def figure_of(history: Sequence[Mapping[str, Any]], experts: Sequence[str]) -> Any:
    """Return a figure of the losses, the learning rate, the perplexity by domain, and the load by expert and layer.

    Args:
        history: what the Trainer logged.
        experts: their names, in the model's order. A dense model has none: no balancing loss, and no load.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8 if experts else 4), layout="constrained")
    panels = iter(figure.subplots(2 if experts else 1, 3).flatten())
    loss = next(panels)
    _curve(loss, history, "loss", "loss" if _points(history, "teacher_loss")[0] else "")
    _curve(loss, history, "lm_loss", "language model", "C1")
    _curve(loss, history, "teacher_loss", "teacher", "C2")
    _panel(loss, "loss")
    if experts:
        balance = next(panels)
        _curve(balance, history, "aux_loss")
        _panel(balance, "balancing loss, without its coefficient")
    rate = next(panels)
    rates = _points(history, "learning_rate")
    rate.plot(*rates, color="C0", marker="." if len(rates[0]) == 1 else None)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    _panel(rate, "learning rate")
    _perplexities(next(panels), history)
    if experts:
        _loads(next(panels), history, experts)
        _loads_by_layer(figure, next(panels), history, experts)
    return figure


def _points(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[Any]]:
    found = [entry for entry in history if key in entry]
    return [entry["step"] for entry in found], [entry[key] for entry in found]


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and of its neighbours, a twentieth of the curve around it; fewer at the ends."""
    reach = max(1, len(values) // 40)
    out = []
    for place in range(len(values)):
        near = values[max(0, place - reach) : place + reach + 1]
        out.append(sum(near) / len(near))
    return out


def _curve(ax: Any, history: Sequence[Mapping[str, Any]], key: str, label: str = "", color: str = "C0") -> None:
    steps, values = _points(history, key)
    if not steps:
        return
    label = label or "_"  # matplotlib leaves out of a legend what begins so
    if len(steps) <= _FEW:
        ax.plot(steps, values, color=color, label=label, marker="." if len(steps) == 1 else None)
        return
    ax.plot(steps, values, color=color, alpha=0.25, linewidth=1)
    ax.plot(steps, smoothed(values), color=color, label=label)


def _perplexities(ax: Any, history: Sequence[Mapping[str, Any]]) -> None:
    keys = [key for entry in history for key in entry if key.startswith(("perplexity/", HELD_OUT))]
    seen: list[float] = []
    for number, domain in enumerate(dict.fromkeys(key.partition("/")[2] for key in keys)):
        color = f"C{number % 10}"
        _curve(ax, history, f"perplexity/{domain}", domain, color)
        steps, values = _points(history, f"{HELD_OUT}{domain}")
        if steps:
            ax.plot(steps, values, "o", color=color)
        seen += [*values, *_points(history, f"perplexity/{domain}")[1]]
    if any(key.startswith(HELD_OUT) for key in keys):
        ax.plot([], [], "o", color="grey", label="held out")
    if seen and max(seen) > _WIDE * min(seen):
        ax.set_yscale("log")
    _panel(ax, "perplexity by domain")


def _loads(ax: Any, history: Sequence[Mapping[str, Any]], experts: Sequence[str]) -> None:
    for number, name in enumerate(experts):
        _curve(ax, history, f"load/{name}", name, f"C{number % 10}")
    ax.axhline(1 / len(experts), color="grey", linewidth=1, linestyle=":", label="ideal")
    _panel(ax, "load by expert")


def _loads_by_layer(figure: Any, ax: Any, history: Sequence[Mapping[str, Any]], experts: Sequence[str]) -> None:
    _, loads = _points(history, LOAD_PER_LAYER)
    _panel(ax, "load by expert and layer, at the end", "layer")
    if not loads:
        return
    by_expert = [list(shares) for shares in zip(*loads[-1], strict=True)]
    shown = ax.imshow(by_expert, aspect="auto", vmin=0, cmap="viridis")
    ax.set_yticks(range(len(experts)), experts)
    ax.grid(False)
    figure.colorbar(shown, ax=ax)


def _panel(ax: Any, title: str, below: str = "step") -> None:
    """Title a panel and its axis. The legend stands below it, where no curve is."""
    ax.set_title(title)
    ax.set_xlabel(below)
    ax.grid(alpha=0.25)
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        columns = 3 if max(map(len, labels)) < 20 else 2
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns, fontsize="small", frameon=False)
    elif not ax.lines and below == "step":
        ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", color="grey")
