"""The public verb that changes the experts of a merged model without a new merge."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx_merge.checkpoints.layout import INDEX_FILE, Block, Job, write_index
from btx_merge.checkpoints.staging import Staging
from btx_merge.editing.plan import EditPlan, plan_edit
from btx_merge.editing.recipe import EditRecipe
from btx_merge.editing.record import write_records
from btx_merge.editing.shared import SharedWeights
from btx_merge.editing.update import SharedPlan, plan_shared
from btx_merge.errors import InputError, Problem
from btx_merge.files.bounded_json import parse_json
from btx_merge.files.changes import ReadFiles
from btx_merge.files.disk_errors import continuable
from btx_merge.files.folder import file_problems, small_files, write_json
from btx_merge.files.placing import place_of
from btx_merge.files.scratch import move_in, scratch_folder
from btx_merge.fitting.recipe import FitTask
from btx_merge.fitting.run import fit_folder
from btx_merge.merging.experts import expert_columns, expert_rows
from btx_merge.merging.files import add_tokens
from btx_merge.merging.mixture import ExpertColumns, ExpertRows, SharedRows
from btx_merge.merging.run import read_files
from btx_merge.model.files import copy_files
from btx_merge.model.merged import MergedModel
from btx_merge.model.opening import open_model
from btx_merge.options import Options, device_problems, refuse_unused
from btx_merge.reporting import Reporter
from btx_merge.sources.text_checks import check_texts
from btx_merge.sources.vocabulary import tokenizer_json

if TYPE_CHECKING:
    from btx_merge.model.held_out import LayerFit


@dataclass(frozen=True)
class EditReport:
    """What an edit did."""

    output: Path
    """The folder of the edited model."""
    experts: tuple[str, ...]
    """The result's experts, in the order of the router's rows."""
    shared: str
    """What became of the shared weights: updated or kept."""
    shared_reason: str
    """Why they were kept, or what their update goes by."""
    router_rows: dict[str, str]
    """New expert to how its row came about: logistic, ridge, random, zeros, or kept for one that was replaced."""
    warnings: tuple[Problem, ...]
    """What deserves a look: shared weights that could not be updated, and oddities of the new sources."""
    kept_bytes: int
    """Bytes that an earlier, interrupted run had written."""
    seconds: float
    """Wall time in seconds, checks included."""
    layers: tuple[LayerFit, ...] = ()
    """How each layer's new rows came out, where they were fitted."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as `--json` prints them."""
        plain = {"output": str(self.output), "warnings": [str(warning) for warning in self.warnings]}
        return {**vars(self), **plain, "layers": [asdict(layer) for layer in self.layers]}


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
    target = place_of(output)
    with ExitStack() as stack:

        def scratch() -> Path:
            """Make a folder beside the target that goes when the edit ends."""
            return stack.enter_context(scratch_folder(target.parent))

        model = _open(recipe, target, options)
        planned = plan_edit(recipe, model, scratch)
        shared = plan_shared(planned, scratch)
        warnings = (*shared.warnings, *planned.warnings)
        for warning in warnings:
            reporter.warn(str(warning))
        layout = planned.mixture
        content = partial(_fill, planned, SharedWeights(planned, shared.update))
        what = repr(recipe), shared.outcome
        with (
            continuable(target),
            Staging(target, layout, content, _read_files(planned, shared), *what, reporter=reporter) as staging,
        ):
            staging.write(options.workers)
            files = staging.scratch()
            _write_files(planned, files)
            layers = _fit(planned, staging.folder, files, options, reporter) if planned.row_fit else []
            write_records(planned, shared.outcome, files, layers)
            move_in(files, staging.folder)
            staging.finish(options.overwrite)
    return EditReport(
        target,
        tuple(layout.expert_names),
        shared.outcome,
        shared.reason,
        planned.router_inits,
        warnings,
        staging.kept_bytes,
        time.perf_counter() - began,
        tuple(layers),
    )


def _open(recipe: EditRecipe, target: Path, options: Options) -> MergedModel:
    """Open the model and see that its small files, the texts and the device can be used.

    Raises:
        InputError: every reason to refuse so far.
    """
    model, problems = open_model(recipe.model, target, options.overwrite)
    problems += check_texts(recipe.domain_text, model.located.folder if model else None)
    problems += device_problems(options.device)
    if model:
        problems += file_problems(model.located.folder, [*small_files(model.located.folder)])
    if problems or model is None:
        raise InputError(problems)
    return model


def _fill(edit: EditPlan, shared: SharedWeights, job: Job) -> Iterator[Block]:
    """Yield the bytes of a job in order, each block for one of its extents."""
    if edit.is_of_router(job.tensor):
        yield 0, edit.router_rows(job)
    elif isinstance(job, SharedRows):
        yield from shared.rows(job)
    elif isinstance(job, ExpertColumns):
        yield from expert_columns(job, edit.mixture)
    elif isinstance(job, ExpertRows):
        if edit.is_kept(edit.mixture.experts[job.source]):
            job = replace(job, fold_layer=None)  # it has absorbed its norm already
        yield from expert_rows(job, edit.mixture, shared.stored_norm)
    else:
        raise TypeError(f"{job.tensor.name}: nothing fills a {type(job).__name__}")


def _read_files(edit: EditPlan, shared: SharedPlan) -> ReadFiles:
    """Return the files that the edit reads: of the model, of new experts, and of the sources of an update."""
    mixtures = [edit.mixture, *((shared.update.before, shared.update.after) if shared.update else ())]
    sources = {id(source): source for mixture in mixtures for source in mixture.sources}
    return read_files(sources.values(), edit.model.located)


def _write_files(edit: EditPlan, folder: Path) -> None:
    """Write everything beside the weights, without a record of the edit."""
    mixture = edit.mixture
    copy_files(edit.model.located.folder, folder, leaving_out=INDEX_FILE)
    if mixture.vocabulary.new_tokens:
        add_tokens(folder, parse_json(tokenizer_json(folder)), mixture.vocabulary.new_tokens)
    write_index(mixture, folder)
    write_json(folder / "config.json", _config(edit))


def _config(edit: EditPlan) -> dict[str, Any]:
    """Return the model's config with the new set of experts."""
    config, mixture = dict(edit.model.config), edit.mixture
    config |= {
        "num_local_experts": mixture.num_experts,
        "num_experts_per_tok": mixture.num_experts_per_tok,
        "expert_names": mixture.expert_names,
        "vocab_size": mixture.vocabulary.size,
    }
    if active := config.get("active_experts"):
        old = edit.model.expert_names
        numbers = {old.index(expert) if isinstance(expert, str) else expert for expert in active}
        stay = [mixture.expert_names[new] for new, number in enumerate(edit.row_origins) if number in numbers]
        config["active_experts"] = stay or None
    return config


def _fit(edit: EditPlan, folder: Path, files: Path, options: Options, reporter: Reporter) -> tuple[LayerFit, ...]:
    """Fit the rows of new experts in the folder where the weights were just written."""
    recipe = edit.recipe
    texts = {text.name: text for text in recipe.domain_text}
    task = FitTask(
        texts,
        {},
        recipe.domain_tokens,
        router=edit.row_fit,
        router_ridge=recipe.router_ridge,
        rows=tuple(edit.fitted_rows),
    )
    return fit_folder(folder, files, task, options, reporter).layers
