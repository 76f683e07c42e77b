"""The public verb that changes the experts of a merged model without a new merge."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from btx_merge.architectures.llama import FF_NORM
from btx_merge.checkpoints.layout import INDEX_FILE, Block, Job, write_index
from btx_merge.checkpoints.staging import Staging
from btx_merge.editing.card import edit_section, edited_card
from btx_merge.editing.plan import EditPlan, plan_edit
from btx_merge.editing.recipe import EditRecipe
from btx_merge.editing.shared import SharedWeights
from btx_merge.editing.update import shared_update
from btx_merge.errors import InputError, Problem
from btx_merge.files.bounded_json import parse_json
from btx_merge.files.changes import ReadFiles
from btx_merge.files.disk_errors import continuable
from btx_merge.files.folder import file_problems, read_text, small_files, write_json
from btx_merge.files.scratch import move_in, scratch_folder
from btx_merge.fitting.recipe import FitTask
from btx_merge.fitting.run import device_problems, fit_folder
from btx_merge.merging.experts import expert_rows
from btx_merge.merging.files import add_tokens
from btx_merge.merging.plan import ExpertRows, SharedRows
from btx_merge.merging.run import fill, read_files
from btx_merge.model.files import copy_files
from btx_merge.model.opening import open_model
from btx_merge.model.records import RECIPE_FILE, append_record
from btx_merge.model.router_state import trainings
from btx_merge.options import Options, refuse_unused
from btx_merge.reporting import Reporter
from btx_merge.sources.text_checks import check_texts
from btx_merge.sources.vocabulary import tokenizer_json
from btx_merge.texts.references import public_record

if TYPE_CHECKING:
    from btx_merge.model.held_out import LayerFit


UPDATED, KEPT = "updated", "kept"


@dataclass(frozen=True)
class EditReport:
    """What an edit did."""

    output: Path
    experts: tuple[str, ...]
    """Of the result, in the order of the router's rows."""
    shared: str
    """updated or kept."""
    shared_reason: str
    """Why they were kept, or what their update goes by."""
    router_rows: dict[str, str]
    """New expert to how its row came about: ridge, random, zeros, or kept for one that was replaced."""
    warnings: tuple[Problem, ...]
    kept_bytes: int
    """Bytes that an earlier, interrupted run had written."""
    seconds: float
    layers: tuple[LayerFit, ...] = ()
    """For ridge: how each layer's new rows came out."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them."""
        plain = {"output": str(self.output), "warnings": [str(warning) for warning in self.warnings]}
        return {**vars(self), **plain, "layers": [asdict(layer) for layer in self.layers]}


@dataclass(frozen=True, eq=False)
class _Edit:
    """All that is decided and checked before a byte is written."""

    planned: EditPlan
    shared: SharedWeights
    reason: str
    warnings: tuple[Problem, ...]

    @property
    def outcome(self) -> str:
        return UPDATED if self.shared.update else KEPT

    def fill(self, job: Job) -> Iterator[Block]:
        """The bytes of a job in order."""
        planned = self.planned
        if planned.is_of_router(job.tensor):
            yield 0, planned.router_rows(job)
        elif isinstance(job, SharedRows):
            yield from self.shared.rows(job)
        elif isinstance(job, ExpertRows) and job.fold_layer is not None:
            if planned.is_kept(planned.plan.experts[job.source]):
                job = replace(job, fold_layer=None)
            yield from expert_rows(job, planned.plan, lambda layer: self.shared.gamma(FF_NORM.format(layer=layer)))
        else:
            yield from fill(planned.plan, job)

    def read_files(self) -> ReadFiles:
        """Return the files that the edit reads: of the model, of new experts, and of the sources of an update."""
        update = self.shared.update
        plans = [self.planned.plan, *((update.before, update.after) if update else ())]
        sources = {id(source): source for plan in plans for source in plan.sources}
        return read_files(sources.values(), self.planned.model.located)


def edit(
    recipe: EditRecipe,
    output: str | Path,
    options: Options = Options(),
    reporter: Reporter = Reporter(),
) -> EditReport:
    """Write a merged model with other experts into the folder `output`; the model itself stays as it is.

    Experts that stay and their router rows are copied bit for bit. What was interrupted is continued by the same call.

    Args:
        options: `overwrite` and `workers`; `device`, on which router rows are fitted.

    Raises:
        InputError: every reason to refuse; nothing has been written.
        MergeError: the edit could not be carried out; `output` is as it was.
    """
    began = time.perf_counter()
    refuse_unused(options, "edit", "overwrite", "workers", "device")
    target = Path(output).expanduser().resolve()
    with ExitStack() as stack:

        def scratch() -> Path:
            return stack.enter_context(scratch_folder(target.parent))

        edited = _plan(recipe, target, options, scratch)
        planned = edited.planned
        new = (warning for warning in planned.examined.warnings if warning.source in planned.new)
        warnings = (*edited.warnings, *new)
        for warning in warnings:
            reporter.warn(str(warning))
        what = repr(planned.recipe), edited.outcome
        with (
            continuable(target),
            Staging(target, planned.plan, edited.fill, edited.read_files(), *what, reporter=reporter) as staging,
        ):
            staging.write(options.workers)
            files = staging.scratch()
            _write_files(edited, files)
            layers = _fit(planned, staging.folder, files, options, reporter) if planned.fitted_rows else []
            _write_records(edited, files, layers)
            move_in(files, staging.folder)
            staging.finish(options.overwrite)
    return EditReport(
        target,
        tuple(planned.plan.expert_names),
        edited.outcome,
        edited.reason,
        planned.router_inits,
        warnings,
        staging.kept_bytes,
        time.perf_counter() - began,
        tuple(layers),
    )


def _plan(recipe: EditRecipe, target: Path, options: Options, scratch: Callable[[], Path]) -> _Edit:
    model, problems = open_model(recipe.model, target, options.overwrite)
    problems += check_texts(recipe.domain_text, model.located.folder if model else None)
    problems += device_problems(options.device)
    if model:
        problems += file_problems(model.located.folder, [*small_files(model.located.folder)])
    if problems or model is None:
        raise InputError(problems)
    planned = plan_edit(recipe, model, scratch)
    update, reason, warnings = shared_update(planned, scratch)
    return _Edit(planned, SharedWeights(planned, update), reason, tuple(warnings))


def _write_files(edited: _Edit, folder: Path) -> None:
    """Everything beside the weights, without a record of the edit."""
    planned, plan = edited.planned, edited.planned.plan
    copy_files(planned.model.located.folder, folder, leaving_out=INDEX_FILE)
    if plan.vocabulary.new_tokens:
        add_tokens(folder, parse_json(tokenizer_json(folder)), plan.vocabulary.new_tokens)
    write_index(plan, folder)
    write_json(folder / "config.json", _config(planned))


def _config(planned: EditPlan) -> dict[str, Any]:
    """The model's config with the new set of experts."""
    config, plan = dict(planned.model.config), planned.plan
    config |= {
        "num_local_experts": plan.num_experts,
        "num_experts_per_tok": plan.recipe.num_experts_per_tok,
        "expert_names": plan.expert_names,
        "vocab_size": plan.vocabulary.size,
    }
    if active := config.get("active_experts"):
        old = planned.model.expert_names
        numbers = {old.index(expert) if isinstance(expert, str) else expert for expert in active}
        stay = [plan.expert_names[new] for new, number in enumerate(planned.row_origins) if number in numbers]
        config["active_experts"] = stay or None
    return config


def _fit(planned: EditPlan, folder: Path, files: Path, options: Options, reporter: Reporter) -> list[LayerFit]:
    recipe = planned.recipe
    texts = {text.name: text for text in recipe.domain_text}
    rows = tuple(planned.fitted_rows)
    task = FitTask(texts, {}, recipe.domain_tokens, router="ridge", router_ridge=recipe.router_ridge, rows=rows)
    return fit_folder(folder, files, task, options, reporter)


def _write_records(edited: _Edit, files: Path, layers: list[LayerFit]) -> None:
    """Add the edit to the recipe and to the card."""
    planned, recipe = edited.planned, edited.planned.recipe
    values = planned.new_values(public=True) if planned.values else {}
    if edited.outcome == KEPT and planned.values and not recipe.is_rename_only:
        values["shared_over"] = planned.shared_over
    elif recipe.is_rename_only and "shared_over" in planned.values:
        values["shared_over"] = planned.values["shared_over"]
    (files / RECIPE_FILE).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    if (files / "README.md").exists():
        card = read_text(files / "README.md")
        (files / "README.md").write_text(edited_card(card, planned, edited.outcome == UPDATED), encoding="utf-8")
    done: dict[str, Any] = {"drop": list(recipe.drop), "rename": dict(recipe.rename)}
    done |= {key: list(getattr(recipe, key)) for key in ("add", "replace")}
    entry: dict[str, Any] = {key: value for key, value in done.items() if value}
    entry |= {"shared": edited.outcome, "router_rows": dict(planned.router_inits)}
    entry["trainings_before"] = trainings(planned.values)
    if "random" in planned.router_inits.values():
        std = recipe.router_std or planned.plan.seed.config["initializer_range"]
        entry |= {"router_std": std, "random_seed": recipe.random_seed}
    if layers:
        texts = public_record(recipe.domain_text)
        entry |= {"domain_text": texts, "domain_tokens": recipe.domain_tokens, "router_ridge": recipe.router_ridge}
        entry |= {"layers": [asdict(layer) for layer in layers]}
    tools = ("btx-merge", "numpy", *(("torch", "transformers") if layers else ()))
    entry["tools"] = {name: version(name) for name in tools}
    computes_the_same = recipe.is_rename_only and recipe.num_experts_per_tok is None
    results = None if computes_the_same else ()  # figures of another model
    append_record(files, "edits", entry, edit_section(planned, edited.outcome), results=results)
