"""The report of an evaluation in a folder: numbers, tables and a picture."""

from __future__ import annotations

from pathlib import Path

from btx_merge.evaluation.picture import draw
from btx_merge.evaluation.report import EvalReport
from btx_merge.evaluation.tables import bits_table, lines_of, perplexity_table
from btx_merge.files.folder import write_json
from btx_merge.files.placing import put_in_place
from btx_merge.files.scratch import scratch_folder
from btx_merge.model.card import markdown_table
from btx_merge.model.files import EVALUATION
from btx_merge.reporting import Reporter
from btx_merge.sources.cards import in_card


def write_report(report: EvalReport, target: Path, overwrite: bool, reporter: Reporter) -> None:
    """Write `eval.json`, `eval.md` and the picture into a folder, which gets its name when all of it is there.

    Raises:
        InputError: something has come into the folder's place meanwhile.
        OSError: the disk refused.
    """
    with scratch_folder(target.parent) as folder:
        made = folder / "report"
        made.mkdir()
        write_json(made / "eval.json", report.to_dict())
        (made / "eval.md").write_text(f"# {in_card(report.model)}\n\n{described(report)}", encoding="utf-8")
        draw(report, made / EVALUATION)
        put_in_place(made, target, overwrite, reporter.note, "the same command")


def described(report: EvalReport) -> str:
    """Return tables, notes and picture in Markdown."""
    notes = "\n".join(f"- {line}" for line in lines_of(report))
    parts = ["Bits per byte, and the fraction of the gap between the seed and the best single source that is closed:"]
    if not report.oracle:
        parts = ["Bits per byte:"]
    parts += [markdown_table(*bits_table(report), "---:"), "Perplexity per token:"]
    parts += [markdown_table(*perplexity_table(report), "---:"), f"![bits per byte by domain and model]({EVALUATION})"]
    return "\n\n".join(part.rstrip() for part in [*parts, notes]) + "\n"
