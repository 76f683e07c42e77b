"""The public verb that says what a merged model is worth."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from btx_merge.errors import InputError, MergeInterrupted, NonFiniteError, Problem, collecting
from btx_merge.evaluation.card import update_card
from btx_merge.evaluation.files import write_report
from btx_merge.evaluation.harness import command, write_tasks
from btx_merge.evaluation.models import (
    Entry,
    Measured,
    ensemble_of,
    entries_of,
    hub_problem,
    open_measured,
    overlap_problems,
    sources_problems,
    target_problems,
    window_of,
)
from btx_merge.evaluation.recipe import EvalRecipe
from btx_merge.evaluation.report import BTM, ROUTED, SOURCE, EvalReport, Row, Score, oracle_of, with_gaps
from btx_merge.files.disk_errors import continuable
from btx_merge.files.folder import file_problems
from btx_merge.files.placing import place_of
from btx_merge.files.scratch import scratch_folder
from btx_merge.measuring.windows import Domain, Progress
from btx_merge.options import Options, chosen_device, device_problems, refuse_unused
from btx_merge.reporting import Reporter
from btx_merge.sources.text_checks import check_texts
from btx_merge.sources.tokenizer_files import load_tokenizer, no_tokenizer
from btx_merge.texts.readers import missing_packages

ROUTED_NAME = "merged, own expert"


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """All that is decided and checked before a model is loaded."""

    recipe: EvalRecipe
    model: Measured
    window: int
    entries: list[Entry]
    ensemble: list[Entry]
    """The experts of Branch-Train-Merge."""
    warnings: tuple[Problem, ...]


def evaluate(
    recipe: EvalRecipe,
    output: str | Path | None = None,
    options: Options = Options(),
    reporter: Reporter = Reporter(),
    *,
    card: bool = False,
    lm_eval_tasks: str | Path | None = None,
) -> EvalReport:
    """Measure a merged model on held-out text by domain, beside the models that it was made of; or any other, alone.

    Figures are those of lm-evaluation-harness' `loglikelihood_rolling`. One model is in memory at a time.

    Args:
        output: a folder for the report: `eval.json`, `eval.md` and `eval.png`. None: nothing is written.
        options: `device`; `overwrite`, for `output`.
        lm_eval_tasks: a folder for the same texts as tasks of lm-evaluation-harness. None: none are written.
        card: whether table and picture go into the model's own card, with the figures in its metadata.

    Raises:
        InputError: every reason to refuse, before a model is loaded; or a text that cannot be read.
        NonFiniteError: a loss is not finite; no report was written.
        MergeError: the disk refused; `MergeInterrupted` for Ctrl-C, and no report was written.
    """
    began = time.perf_counter()
    refuse_unused(options, "evaluate", "device", "overwrite")
    target, tasks = (None if path is None else place_of(path) for path in (output, lm_eval_tasks))
    interrupted = MergeInterrupted("Interrupted. No report was written.")
    with continuable(target or tasks or Path(recipe.model), "", interrupted), ExitStack() as stack:
        checked = _check(recipe, [path for path in (target, tasks) if path], options, card, stack)
        for warning in checked.warnings:
            reporter.warn(str(warning))
        places = [path for path in (target, tasks, checked.model.located.folder if card else None) if path]
        for place in places:
            with scratch_folder(place.parent):
                pass  # what is measured for hours can be written
        report = _measure(checked, target, tasks, options, reporter)
        report = replace(report, seconds=time.perf_counter() - began)
        if target is not None:
            write_report(report, target, options.overwrite, reporter)
        if card:
            update_card(report, checked.model.located.folder)
    return report


def _check(recipe: EvalRecipe, targets: Sequence[Path], options: Options, card: bool, stack: ExitStack) -> _Evaluation:
    """Open everything without reading weights. `targets` are the folders that will be written."""
    model: Measured | None = None
    problems: list[Problem] = []
    with collecting(problems):
        model = open_measured(recipe.model)
    problems += target_problems(targets, options.overwrite)
    problems += check_texts((*recipe.data, *recipe.btm_text), model.located.folder if model else None)
    problems += device_problems(options.device)
    if targets or card:
        problems += missing_packages("matplotlib")
    if model is None:
        raise InputError(problems)
    problems += no_tokenizer("model", model.located.folder)
    problems += sources_problems(recipe, model.merged)
    if card:
        problems += [*hub_problem(model.located), *file_problems(model.located.folder, ["README.md"])]
    window, entries, ensemble, warnings = 1, list[Entry](), list[Entry](), list[Problem]()
    with collecting(problems):
        window = window_of(recipe, model.config)
        entries, warnings = entries_of(recipe, model, window, lambda: stack.enter_context(scratch_folder(None)))
        ensemble = ensemble_of(recipe, entries) if model.merged else []
    folders = {entry.name: entry.folders for entry in entries} or {"model": (model.located.folder,)}
    problems += overlap_problems(targets, folders)
    if problems:
        raise InputError(problems)
    return _Evaluation(recipe, model, window, entries, ensemble, tuple(warnings))


def _measure(
    checked: _Evaluation, target: Path | None, tasks: Path | None, options: Options, reporter: Reporter
) -> EvalReport:
    """Run one model after the other; before that, write the tasks for the harness."""
    import torch

    recipe, model = checked.recipe, checked.model
    device = chosen_device(options.device)
    dtype = recipe.dtype or ("float32" if device.type == "cpu" else model.dtype)
    tokenizer = load_tokenizer(model.located.folder)
    domains = [Domain.counted(text, tokenizer, checked.window, recipe.tokens) for text in recipe.data]
    if tasks:
        write_tasks(domains, tasks, options.overwrite, reporter)
        names = [domain.text.name for domain in domains]
        reporter.note(f"the same by the harness: {command(recipe.model, names, tasks, checked.window, dtype)}")
    kinds = sum(len(entry.kinds) for entry in checked.entries)
    progress = Progress(reporter, kinds * sum(domain.amount.nbytes for domain in domains))
    rows: list[Row] = []
    losses: dict[str, dict[str, Any]] = {entry.name: {} for entry in checked.ensemble}
    for entry in checked.entries:
        loaded = entry.load(getattr(torch, dtype), device)
        rows += _rows_of(entry, loaded, domains, checked, progress, losses)
        del loaded
        gc.collect()  # the model is gone before the next one comes
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if checked.ensemble:
        rows += _ensemble_rows(checked, domains, tokenizer, losses)
    oracle = oracle_of(rows)
    return EvalReport(
        model.located.public_name,
        {domain.text.name: domain.amount for domain in domains},
        with_gaps(rows, oracle),
        oracle,
        checked.window,
        dtype,
        str(device),
        0.0,
        checked.warnings,
        target,
    )


def _rows_of(
    entry: Entry,
    loaded: Any,
    domains: Sequence[Domain],
    checked: _Evaluation,
    told: Callable[[int], None],
    losses: Mapping[str, dict[str, Any]],
) -> list[Row]:
    """Measure a model, once for each of its rows.

    Args:
        losses: gets, by domain, those of all tokens for each source that is in it: the experts of Branch-Train-Merge.

    Raises:
        InputError: such an expert reads other tokens than the merged model.
    """
    from btx_merge.evaluation.scoring import score
    from btx_merge.measuring.models import sent_to

    tokenizer, merged = load_tokenizer(entry.tokenizer), checked.model.merged
    tokens = checked.recipe.batch_size * checked.window
    kept = losses.get(entry.name) if entry.kinds == (SOURCE,) else None
    rows = []
    for kind in entry.kinds:
        scores = {}
        for domain in domains:
            name = domain.text.name
            of_domain = None if kept is None else kept.setdefault(name, {})
            with sent_to(loaded, merged.experts_of(name)) if merged and kind == ROUTED else nullcontext():
                scores[name] = score(loaded, domain, tokenizer, tokens, told, of_domain)
            if kept is not None and not scores[name].same_tokens:
                remedy = "Leave it out of --btm-text."
                found = "reads other tokens"
                raise InputError([Problem(entry.name, str(entry.tokenizer), found, "the model's", remedy)])
        _refuse_nonfinite(entry.name, scores)
        rows.append(Row(ROUTED_NAME if kind == ROUTED else entry.name, kind, scores, {}))
    return rows


def _ensemble_rows(
    checked: _Evaluation, domains: Sequence[Domain], tokenizer: Any, losses: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    """Measure Branch-Train-Merge, by what its experts have lost on every token."""
    from btx_merge.evaluation.btm import BranchTrainMerge
    from btx_merge.evaluation.ensemble import ensemble_scores

    recipe = checked.recipe
    ensemble = BranchTrainMerge(dict.fromkeys(losses), recipe.btm_text, tokenizer, max(recipe.btm))
    scores: dict[int, dict[str, Score]] = {number: {} for number in recipe.btm}
    for domain in domains:
        name = domain.text.name
        of_domain = {expert: kept[name] for expert, kept in losses.items()}
        found = ensemble_scores(ensemble, domain, of_domain, recipe.btm)
        for number, one in zip(recipe.btm, found, strict=True):
            scores[number][name] = one
    return [Row(f"Branch-Train-Merge, top {number}", BTM, found, {}) for number, found in scores.items()]


def _refuse_nonfinite(name: str, scores: Mapping[str, Score]) -> None:
    """Refuse figures that are none: nothing can be compared with them, and no oracle found.

    Raises:
        NonFiniteError: a loss is not finite.
    """
    for domain, found in scores.items():
        if not math.isfinite(found.bits_per_byte):
            raise NonFiniteError(f"{name}: its loss on {domain} is not finite. No report was written.")
