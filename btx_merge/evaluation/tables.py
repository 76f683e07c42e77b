"""The tables of an evaluation as rows of text, for a terminal and for a card."""

from __future__ import annotations

from collections.abc import Callable

from btx_merge.evaluation.report import EvalReport, Score
from btx_merge.reporting import counted

_NO_GAP = "no gap"

Table = tuple[list[str], list[list[str]]]
"""A head and its rows."""


def bits_table(report: EvalReport) -> Table:
    """Return bits per byte by domain, and how much of the gap between seed and oracle is closed."""
    head, rows = _table(report, lambda score: f"{score.bits_per_byte:.3f}")
    if not report.oracle:
        return head, rows
    domains = list(report.domains)
    head += [*(f"gap closed, {domain}" for domain in domains), "mean"]
    for cells, row in zip(rows, report.rows, strict=True):
        cells += [*(_share(row.closed[domain]) for domain in domains), _share(row.mean_closed)]
    best = [report.oracle[domain] for domain in domains]
    full = ["" if domain in report.without_gap else "100%" for domain in domains]
    oracle = [*(f"{one.bits_per_byte:.3f} ({one.source})" for one in best), *full, "100%" if any(full) else ""]
    rows.append(["oracle, best source", *oracle])
    return head, rows


def perplexity_table(report: EvalReport) -> Table:
    """Return perplexity per token by domain; a star where a model reads other tokens than the merged one."""
    return _table(report, lambda score: f"{score.perplexity:#.5g}".rstrip(".") + ("" if score.same_tokens else " *"))


def lines_of(report: EvalReport) -> list[str]:
    """Return what was measured, and what of the tables must be read with care."""
    lines = []
    for name, amount in report.domains.items():
        documents, windows = counted(amount.documents, "document"), counted(amount.windows, "window")
        lines.append(f"{name}: {amount.nbytes:,} bytes in {documents}: {amount.tokens:,} tokens in {windows}.")
    dtype = f"in {report.dtype}" + ("" if report.device == "cpu" else f" on {report.device}")
    lines.append(f"Every token is scored once, in windows of at most {counted(report.window, 'token')}, {dtype}.")
    if report.without_gap:
        lines.append(
            f"No source is better than the seed at {', '.join(report.without_gap)} by a thousandth of its bits: "
            "there is no gap to close."
        )
    others = {row.name for row in report.rows for score in row.scores.values() if not score.same_tokens}
    if others:
        lines.append(
            f"Read other tokens, so that only bits per byte can be compared (*): {', '.join(sorted(others))}."
        )
    return lines


def _table(report: EvalReport, cell: Callable[[Score], str]) -> Table:
    domains = list(report.domains)
    rows: list[list[str]] = []
    for row in report.rows:
        rows.append([row.name, *(cell(row.scores[domain]) for domain in domains)])
    return ["model", *domains], rows


def _share(part: float | None) -> str:
    return _NO_GAP if part is None else f"{part:.1%}"
