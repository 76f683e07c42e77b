"""What a person sees of a verb: tables of its report, and bars while it works, drawn by rich."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from btx_merge.checkpoints.dtypes import TORCH_NAMES
from btx_merge.cli.printing import Lines
from btx_merge.evaluation.report import EvalReport
from btx_merge.evaluation.tables import Table as Cells
from btx_merge.evaluation.tables import bits_table, lines_of, perplexity_table
from btx_merge.exporting.run import ExportReport
from btx_merge.merging.plan import Fate
from btx_merge.merging.run import Check, Report
from btx_merge.model.card import count
from btx_merge.model.held_out import fit_advice
from btx_merge.model.info import ModelInfo
from btx_merge.reporting import counted, printable, readable

if TYPE_CHECKING:
    from btx_merge.inspecting.figures import DomainFigures, ModelFigures
    from btx_merge.inspecting.run import RoutingReport
    from btx_merge.model.held_out import LayerFit


def _console(stderr: bool = False) -> Console:
    """Return a console that takes text as it is: `[bold]` and `:cat:` in a path are no markup and no picture."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


class Bars(Lines):
    """Draws how far a verb's work is, one bar at a time: the bytes that are written, or layers, or steps."""

    def __init__(self, verb: str) -> None:
        super().__init__()
        self._of_bytes = verb
        self._begin("", 0)

    def _begin(self, verb: str, total: int, *columns: ProgressColumn) -> None:
        """Put the next bar in the place of the one before."""
        self._progress = Progress(verb, BarColumn(), *columns, TimeRemainingColumn(), console=_console(stderr=True))
        self._task = self._progress.add_task("", total=total)
        self._verb = verb

    def stop(self) -> None:
        """Leave the last bar as it is."""
        self._progress.stop()

    def started(self, nbytes: int) -> None:
        """Show a bar for bytes."""
        self.stop()
        self._begin(self._of_bytes, nbytes, DownloadColumn(), TransferSpeedColumn())
        self._progress.start()

    def bytes_done(self, nbytes: int) -> None:
        """Add bytes that are done."""
        self._progress.advance(self._task, nbytes)

    def layer_done(self, done: int, of: int) -> None:
        """Show how many layers of how many are fitted."""
        self._count("fitting", done, of)

    def step_done(self, done: int, of: int) -> None:
        """Show how many steps of how many a finetuning has done."""
        self._count("training", done, of)

    def text_done(self, done: int, of: int) -> None:
        """Show how much of the text is measured, over all models."""
        if done == 0:
            self.started(of)
        self._progress.update(self._task, completed=done)

    def _count(self, verb: str, done: int, of: int) -> None:
        if self._verb != verb:
            self.stop()
            self._begin(verb, of, MofNCompleteColumn())
            self._progress.start()
        self._progress.update(self._task, completed=done)


def fit_line(layers: Sequence[LayerFit]) -> str:
    """Return how the routers came out, over all layers."""
    mean = sum(layer.accuracy for layer in layers) / len(layers)
    worst = min(layers, key=lambda layer: layer.accuracy)
    return (
        f"{mean:.0%} of held-out tokens go to their own domain's expert first "
        f"(fewest in layer {worst.layer}: {worst.accuracy:.0%})"
    )


def print_check(checked: Check) -> None:
    """Print the sources with their distance from the seed, and the size of the merge."""
    plan = checked.plan
    groups = list(dict.fromkeys(item.group for item in checked.divergence))
    title = "Sources, and their relative distance from the seed; where it is =, all bytes are the seed's"
    table = Table("source", "model", "dtype", title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for group in groups:
        table.add_column(group, justify="right", overflow="fold")
    distance = {(item.source, item.group): f"{item.distance:.3f}" for item in checked.divergence}
    distance |= {(source, group): "=" for source, groups in (checked.unchanged or {}).items() for group in groups}
    for source in plan.sources:
        model = source.located.public_name + (f"@{source.located.revision[:8]}" if source.located.revision else "")
        if source.base:
            model += f" on {source.base.public_name}"
        cells = [distance.get((source.name, group), "") for group in groups]
        table.add_row(*map(printable, (source.name, model, source.dtype, *cells)))
    console = _console()
    console.print(table)
    recipe = plan.recipe
    shared = recipe.combine
    if recipe.has_own_head:
        shared += ", a head of its own"
    if recipe.fold_norms:
        shared += ", norms folded into the experts"
    if checked.is_lossless:
        shared += "; every source has the seed's, averaging loses nothing"
    added = counted(len(plan.vocabulary.new_tokens), "token")
    lines = {
        "experts": f"{plan.num_experts} ({recipe.expert_mode}): {', '.join(plan.expert_names)}",
        "shared weights": shared,
        "routers": f"{recipe.router_type}, {recipe.router_init}, experts per token: {plan.experts_per_token}",
        "parameters": f"{count(plan.parameters)} in all, {count(plan.active_parameters)} active per token",
        "vocabulary": f"{plan.vocabulary.size:,} rows, {added} new to the seed",
        "output": f"{TORCH_NAMES[plan.dtype]}, {counted(len(plan.shards), 'weights file')}",
        "to read / to write": f"{readable(plan.bytes_to_read)} / {readable(plan.bytes_to_write)}",
        "working memory": f"about {readable(plan.working_memory)}",
    }
    console.print(_facts(lines))


def print_files(checked: Check) -> None:
    """Print what a merge would write, and where."""
    console = _console()
    console.print(printable(f"Would be written to {checked.output}"), soft_wrap=True)
    table = Table("file", box=SIMPLE, pad_edge=False)
    table.add_column("size", justify="right")
    for name, nbytes in checked.files.items():
        table.add_row(printable(name), readable(nbytes))
    console.print(table)


def print_report(report: Report) -> None:
    """Print what became of every input tensor, and what it cost."""
    console = _console()
    console.print(_fates(report.fates))
    plan = report.checked.plan
    rate = plan.bytes_to_write / max(report.seconds, 1e-9)
    lines = {
        "written": f"{report.output}: {readable(plan.bytes_to_write)}, {counted(plan.num_experts, 'expert')}, "
        f"{count(plan.parameters)} parameters, {count(plan.active_parameters)} active per token",
        "took": f"{report.seconds:.1f} s ({readable(int(rate))}/s), peak memory {readable(report.peak_memory)}",
    }
    if report.layers:
        lines["routers"] = fit_line(report.layers)
    if report.losses:
        lines["lost"] = fit_advice(report.losses)
    if plan.recipe.router_init in ("random", "zeros"):
        lines["routers"] = "untrained: fit or train them before you judge the model"
    console.print(_facts(lines))


def print_export(report: ExportReport) -> None:
    """Print what was written, and what it cost."""
    files = counted(len(report.files), "weights file")
    lines = {
        "written": f"{report.output}: {readable(report.nbytes)} in {files}, {count(report.parameters)} parameters",
        "took": f"{report.seconds:.1f} s, peak memory {readable(report.peak_memory)}",
    }
    if report.kept_bytes:
        lines["kept"] = f"{readable(report.kept_bytes)} of an interrupted run"
    _console().print(_facts(lines))


def print_info(info: ModelInfo) -> None:
    """Print what a merged model is, and the commands that lead on."""
    console = _console()
    table = Table("", "expert", "model", "revision", box=SIMPLE, pad_edge=False)
    for expert in info.experts:
        model = (expert.model or "") + (f" on {expert.base}" if expert.base else "")
        table.add_row(str(expert.number), *map(printable, (expert.name, model, (expert.revision or "")[:8])))
    console.print(table)
    on_disk = "" if info.disk_bytes is None else f", {readable(info.disk_bytes)} on disk"
    lines = {
        "model": info.model + (f"@{info.revision[:8]}" if info.revision else ""),
        "routing": f"{info.router_type}, {info.experts_per_token} of {counted(len(info.experts), 'expert')} per token",
        "routers": info.routers + (f"; untrained: {', '.join(info.untrained)}" if info.untrained else ""),
        "parameters": f"{count(info.parameters)} in all, {count(info.active_parameters)} active per token",
        "size": f"{readable(info.nbytes)} of weights in {info.dtype}{on_disk}",
        "tokenizer": "yes" if info.tokenizer else "none",
    }
    console.print(_facts(lines))
    for text in info.history:
        console.print(printable(f"history: {text}"), soft_wrap=True)
    for command in info.next:  # to be copied: nothing of it is left out, and no line of it is broken
        console.print(printable(f"next: {command}", len(command) + 6), soft_wrap=True)


def print_routing(report: RoutingReport) -> None:
    """Print how each model routes each domain, and which experts get next to nothing."""
    console = _console()
    models = [report.model, *([report.against] if report.against else [])]
    head = ["model", "domain", "tokens", "loss", "own expert first", "best alone", "worth most", "regret"]
    rows = [_routed(figures, domain) for figures in models for domain in figures.domains]
    shown = [number for number in range(len(head)) if any(row[number] for row in rows)]  # not all was measured
    if len(models) == 1:
        shown.remove(0)
    console.print(_cells(([head[number] for number in shown], [[row[number] for number in shown] for row in rows])))
    for figures in models:
        for line in _neglect_lines(figures):
            console.print(printable(line), soft_wrap=True)
    console.print(_facts({"written": str(report.output), "took": f"{report.seconds:.1f} s"}))


def _routed(figures: ModelFigures, domain: DomainFigures) -> list[str]:
    """Return a domain's row of the table, with empty cells for what was not measured."""
    own, best, most = figures.own_first(domain), "", ""
    if domain.alone:
        name = min(domain.alone, key=domain.alone.__getitem__)
        best = f"{domain.alone[name]:.3f} ({name})"
    if domain.without:
        name = max(domain.without, key=domain.without.__getitem__)
        most = f"{domain.without[name] - domain.loss:+.3f} without {name}"
    first = f"{sum(own) / len(own):.0%}" if own else ""
    regret = "" if domain.regret is None else f"{domain.regret:.3f}"
    return [figures.model, domain.domain, f"{domain.tokens:,}", f"{domain.loss:.3f}", first, best, most, regret]


def _neglect_lines(figures: ModelFigures) -> Iterator[str]:
    """Return a line for each expert that is dead in some layers, then one for each that is cold in some."""
    neglected = figures.neglected
    for kind, is_dead in (("dead", True), ("cold", False)):
        for expert in figures.experts:
            found = [item for item in neglected if item.expert == expert and item.is_dead == is_dead]
            if not found:
                continue
            layers = ", ".join(str(item.layer) for item in found)
            where, at_most = ("layers", "at most ") if len(found) > 1 else ("layer", "")
            load = f"{at_most}{max(item.load for item in found):.2%} of the choices"
            yield f"{kind}  {expert} in {where} {layers} of {figures.model}: {load}"


def print_evaluation(report: EvalReport) -> None:
    """Print what an evaluation found."""
    console = _console()
    for title, cells in (("Bits per byte", bits_table(report)), ("Perplexity per token", perplexity_table(report))):
        console.print(title)  # as the table's own title it would be broken at the table's width
        console.print(_cells(cells))
    for line in lines_of(report):
        console.print(printable(line), soft_wrap=True)
    if report.output:
        console.print(printable(f"written  {report.output}"), soft_wrap=True)
    console.print(f"took     {report.seconds:.1f} s")


def _cells(cells: Cells) -> Table:
    head, rows = cells
    table = Table(box=SIMPLE, pad_edge=False)
    for number, name in enumerate(head):
        table.add_column(printable(name), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    return table


def _fates(fates: tuple[Fate, ...]) -> Table:
    kinds = list(dict.fromkeys(fate.fate for fate in fates))
    table = Table("source", title="What became of every input tensor", title_justify="left", box=SIMPLE)
    for kind in kinds:
        table.add_column(kind, justify="right")
    for source in dict.fromkeys(fate.source for fate in fates):
        cells = {fate.fate: f"{fate.tensors} ({readable(fate.nbytes)})" for fate in fates if fate.source == source}
        table.add_row(printable(source), *(cells.get(kind, "") for kind in kinds))
    return table


def _facts(lines: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for key, value in lines.items():
        table.add_row(key, printable(value))
    return table
