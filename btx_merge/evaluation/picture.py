"""The picture of an evaluation: bits per byte, a group of bars for each domain and a bar for each model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from btx_merge.evaluation.report import MODEL, ROUTED, EvalReport
from btx_merge.reporting import printable

_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442", "#999999")
"""Those of Okabe and Ito, which people can tell apart whatever colours they see, but for the merged model's."""
_MERGED = "#0072B2"
_HATCHES = ("", "///", "...", "xxx")
"""Where there are more models than colours."""
_MOST_LABELLED = 40
"""Bars up to which each has its figure above it."""


def draw(report: EvalReport, file: Path) -> None:
    """Write the picture of an evaluation; see `figure_of`."""
    figure_of(report).savefig(file, dpi=150)


def figure_of(report: EvalReport) -> Any:
    """Return a figure for a model card: lower is better; a line across each group is the best single source."""
    from matplotlib.figure import Figure

    domains = list(report.domains)
    rows = sorted(report.rows, key=lambda row: (row.kind == ROUTED) + 2 * (row.kind == MODEL))
    bars = len(domains) * len(rows)
    figure = Figure(figsize=(min(16, max(6, 2 + 0.45 * bars)), 4.5), layout="constrained")
    axes = figure.subplots()
    width, others = 0.84 / len(rows), 0
    for number, row in enumerate(rows):
        colour, hatch = _MERGED, ""
        if row.kind == ROUTED:
            hatch = _HATCHES[1]
        elif row.kind != MODEL:
            colour, hatch = _COLOURS[others % len(_COLOURS)], _HATCHES[others // len(_COLOURS) % len(_HATCHES)]
            others += 1
        places = [group + (number - (len(rows) - 1) / 2) * width for group in range(len(domains))]
        values = [row.scores[domain].bits_per_byte for domain in domains]
        drawn = axes.bar(places, values, 0.94 * width, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
        drawn.set_label(_plain(row.name))
        if bars <= _MOST_LABELLED:
            axes.bar_label(drawn, fmt="%.2f", fontsize=8, padding=2)
    for group, best in enumerate(report.oracle.values()):
        label = "best single source" if group == 0 else "_"  # matplotlib leaves out of a legend what begins so
        axes.hlines(best.bits_per_byte, group - 0.45, group + 0.45, "black", "dashed", linewidth=1, label=label)
    axes.set_xticks(range(len(domains)), [_plain(domain) for domain in domains])
    axes.set_ylabel("bits per byte (lower is better)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.1)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, fontsize="small", frameon=False)
    return figure


def _plain(name: str) -> str:
    """Return a name that matplotlib shows as it is: a dollar would begin a formula."""
    return printable(name, 60).replace("$", r"\$")
