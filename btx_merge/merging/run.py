"""The public verbs: `check` finds out whether and what a merge would be, `merge` carries it out."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx_merge.checkpoints.dtypes import TORCH_NAMES
from btx_merge.checkpoints.layout import Block, Job
from btx_merge.checkpoints.staging import Staging
from btx_merge.errors import InputError, Problem
from btx_merge.files.changes import ReadFiles, Stamp
from btx_merge.files.disk_errors import continuable
from btx_merge.files.placing import check_target, place_of
from btx_merge.files.scratch import move_in, scratch_folder
from btx_merge.fitting.recipe import ROUTER_FITS, FitTask
from btx_merge.fitting.run import fit_folder, fit_problems
from btx_merge.merging.checks import examine
from btx_merge.merging.combine import cast, shared_rows
from btx_merge.merging.experts import expert_columns, expert_rows, initial_router, merged_norm
from btx_merge.merging.files import write_files
from btx_merge.merging.mixture import ExpertColumns, ExpertRows, RouterRows, SharedRows
from btx_merge.merging.plan import Fate, Plan, make_plan
from btx_merge.merging.recipe import MergeRecipe
from btx_merge.model.held_out import Fitted
from btx_merge.model.opening import room_problems
from btx_merge.options import Options, refuse_unused
from btx_merge.reporting import Reporter, peak_memory
from btx_merge.sources.divergence import Divergence
from btx_merge.sources.locate import Located
from btx_merge.sources.source import Source
from btx_merge.sources.unchanged import is_lossless, unchanged_groups

if TYPE_CHECKING:
    from btx_merge.model.held_out import DomainLoss, LayerFit


_OPTIONS = ("overwrite", "workers", "device", "statistics")
"""Those of `Options` that a merge takes."""


@dataclass(frozen=True)
class Check:
    """What `check` found: the plan, and all that deserves a look."""

    plan: Plan
    """The merge laid out: its experts, tensors, files and sizes."""
    divergence: tuple[Divergence, ...]
    """How far each expert is from the seed, by group of tensors."""
    warnings: tuple[Problem, ...]
    """What deserves a look, though it stops no merge."""
    unchanged: Mapping[str, tuple[str, ...]] | None = None
    """Source to the groups of weights in which it is the seed, to the byte; None in a merge, which reads once only."""
    output: Path | None = None
    """Where the result would be written, if that was asked."""
    files: Mapping[str, int] = field(default_factory=dict)
    """The files of the result, if that was asked: by name, with their sizes in bytes."""

    @property
    def is_lossless(self) -> bool:
        """Whether every source has the seed's own bytes in all shared weights, so that averaging loses nothing."""
        return self.unchanged is not None and is_lossless(self.plan.sources[1:], self.unchanged)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as `--json` prints them."""
        plan = self.plan
        return {
            "sources": [
                {"name": source.name, "model": source.located.public_name, "revision": source.located.revision}
                for source in plan.sources
            ],
            "experts": plan.expert_names,
            "dtype": TORCH_NAMES[plan.dtype],
            "vocab_size": plan.vocabulary.size,
            "parameters": plan.parameters,
            "active_parameters": plan.active_parameters,
            "bytes_to_read": plan.bytes_to_read,
            "bytes_to_write": plan.bytes_to_write,
            "working_memory": plan.working_memory,
            "shards": [shard.name for shard in plan.shards],
            "divergence": [asdict(item) for item in self.divergence],
            "fates": [asdict(fate) for fate in plan.fates],
            "warnings": [str(warning) for warning in self.warnings],
            **self._compared(),
            **({"output": str(self.output), "files": dict(self.files)} if self.output else {}),
        }

    def _compared(self) -> dict[str, Any]:
        """Return what was found out by reading the sources."""
        if self.unchanged is None:
            return {}
        unchanged = {name: list(groups) for name, groups in self.unchanged.items()}
        return {"unchanged": unchanged, "lossless": self.is_lossless}


@dataclass(frozen=True)
class Report:
    """What a merge did."""

    output: Path
    """The folder of the merged model."""
    checked: Check
    """What was found out before anything was written."""
    seconds: float
    """Wall time in seconds, checks included."""
    peak_memory: int
    """Largest resident size of the process so far, in bytes."""
    kept_bytes: int
    """Bytes that an earlier, interrupted run had written."""
    layers: tuple[LayerFit, ...] = ()
    """How routers that were fitted on text came out, by layer; empty for others."""
    losses: tuple[DomainLoss, ...] = ()
    """What each domain's held-out text costs after a fit: by its source, with its own expert alone, and as it is."""

    @property
    def fates(self) -> tuple[Fate, ...]:
        """What became of every input tensor, by source."""
        return self.checked.plan.fates

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as `--json` prints them."""
        figures = {key: getattr(self, key) for key in ("seconds", "peak_memory", "kept_bytes")}
        fitted = Fitted(self.layers, self.losses).to_dict()
        return {"output": str(self.output), **figures, **fitted, **self.checked.to_dict()}


def check(recipe: MergeRecipe, output: str | Path | None = None, options: Options = Options()) -> Check:
    """Read and check all sources and lay out the merge. Writes nothing.

    Args:
        output: where the result would be written; checked too, and the report then has its files.
        options: those that `merge` would be given.

    Raises:
        InputError: every reason to refuse this merge.
    """
    refuse_unused(options, "merge", *_OPTIONS)
    if output is None:
        with _checked(recipe) as checked:
            return _compared(checked)
    target = place_of(output)
    check_target(target, options.overwrite)
    _refuse_fit(recipe, options)
    with _checked(recipe) as checked, tempfile.TemporaryDirectory(prefix="btx-files-") as small:
        plan = checked.plan
        _check_apart(target, plan.sources)
        if problems := room_problems(target, plan.bytes_to_write):
            raise InputError(problems)
        write_files(plan, Path(small))
        files = {shard.name: shard.nbytes for shard in plan.shards}
        files |= {file.name: file.stat().st_size for file in sorted(Path(small).iterdir())}
        return replace(_compared(checked), output=target, files=files)


def _refuse_fit(recipe: MergeRecipe, options: Options) -> None:
    """Check that what is to be fitted can be, with these options.

    Raises:
        InputError: it cannot. The remedy names all of the fit: who says a part of it gets no more than that part.
    """
    if not recipe.is_fitted:
        return
    asked = {"combine": recipe.combine, "head": recipe.head, "router_init": "ridge", "fit_through": recipe.fit_through}
    words = [f"--{key.replace('_', '-')} {value}" for key, value in asked.items()]
    if problems := fit_problems(options, recipe.router_init, " ".join(words)):
        raise InputError(problems)


def _compared(checked: Check) -> Check:
    """Add what of each source is the seed to the byte, which takes reading it."""
    return replace(checked, unchanged=unchanged_groups(checked.plan.sources, checked.divergence))


def merge(
    recipe: MergeRecipe,
    output: str | Path,
    options: Options = Options(),
    reporter: Reporter = Reporter(),
) -> Report:
    """Merge the recipe's sources into one BTX model (arXiv 2403.07816) in the folder `output`.

    An interrupted merge leaves `OUTPUT.btx-partial`; the same call continues it, and ends with the same bytes.

    Args:
        options: `overwrite` and `workers`; for what is fitted, `device` and `statistics`.

    Raises:
        InputError: a reason to refuse; nothing has been written.
        MergeError: the merge could not be carried out (`NonFiniteError`, `MergeInterrupted`, a disk's refusal);
            `output` is as it was.
    """
    began = time.perf_counter()
    refuse_unused(options, "merge", *_OPTIONS)
    target = place_of(output)
    check_target(target, options.overwrite)
    _refuse_fit(recipe, options)
    with continuable(target), _checked(recipe, target) as checked:
        for warning in checked.warnings:
            reporter.warn(str(warning))
        plan = checked.plan
        read = read_files(plan.sources)
        with Staging(target, plan, partial(fill, plan), read, recipe.to_dict(), reporter=reporter) as staging:
            staging.write(options.workers)
            fitted = Fitted()
            files = staging.scratch()  # a run that is ended while it writes them leaves none that looks whole
            if recipe.is_fitted:
                write_files(plan, files)
                fitted = _fit(plan, staging.folder, files, options, reporter)
                files = staging.scratch()
            write_files(plan, files, fitted)
            move_in(files, staging.folder)
            staging.finish(options.overwrite)
    seconds = time.perf_counter() - began
    return Report(target, checked, seconds, peak_memory(), staging.kept_bytes, fitted.layers, fitted.losses)


def _fit(plan: Plan, folder: Path, files: Path, options: Options, reporter: Reporter) -> Fitted:
    """Fit what the recipe says, in the folder where the weights were just written with means and any routers.

    Args:
        files: the folder with its config and tokenizer.
    """
    recipe = plan.recipe
    segments = plan.vocabulary.segments
    named = [source for source in plan.experts if source.name in recipe.domain_text]
    sources = {source.name: (source, segments[source.name]) for source in named}
    task = FitTask(
        recipe.domain_text,
        recipe.prompts,
        recipe.domain_tokens,
        router=recipe.router_init if recipe.router_init in ROUTER_FITS else None,
        combine=recipe.combine if recipe.fits_shared else None,
        head=recipe.head if recipe.has_own_head else None,
        through=recipe.fit_through,
        router_ridge=recipe.router_ridge,
        regmean_ridge=recipe.regmean_ridge,
        averaged=len(plan.experts),
    )
    return fit_folder(folder, files, task, options, reporter, sources)


def fill(plan: Plan, job: Job) -> Iterator[Block]:
    """Compute the bytes of a job in order, each for one of its extents.

    Raises:
        TypeError: nothing fills this kind of job, which is a fault of btx-merge.
    """
    if isinstance(job, ExpertRows):
        yield from expert_rows(job, plan, partial(merged_norm, plan))
    elif isinstance(job, ExpertColumns):
        yield from expert_columns(job, plan)
    elif isinstance(job, SharedRows):
        yield from shared_rows(job, plan)
    elif isinstance(job, RouterRows):
        hidden = job.tensor.shape[1]
        std = plan.recipe.router_std or plan.seed.config["initializer_range"]
        router = initial_router(plan.recipe, job.layer, plan.num_experts, hidden, std)
        yield 0, cast(router, job, plan)
    else:
        raise TypeError(f"nothing fills a {type(job).__name__}")


@contextmanager
def _checked(recipe: MergeRecipe, target: Path | None = None) -> Iterator[Check]:
    """Check a merge and lay it out. Carry the plan out inside the context: there, what peft merged itself exists."""
    with ExitStack() as stack:

        def scratch() -> Path:
            """Make a folder, beside the target if there is one, that goes when the context ends."""
            return stack.enter_context(scratch_folder(target.parent if target else None))

        examined = examine(recipe, scratch)
        if target:
            _check_apart(target, examined.sources)
        plan = make_plan(recipe, examined.sources, examined.vocabulary)
        yield Check(plan, examined.divergence, examined.warnings)


def _check_apart(target: Path, sources: Sequence[Source]) -> None:
    """Refuse an output that is, holds or lies in a source's folder: replacing it would destroy what is read.

    Raises:
        InputError: it does.
    """
    problems = []
    for source in sources:
        for located in filter(None, (source.located, source.base)):
            folder = located.folder.resolve()
            if target == folder or target in folder.parents or folder in target.parents:
                found = f"overlaps with the source {source.name}, {folder}"
                remedy = "Give another --output."
                problems.append(Problem("output", str(target), found, "a folder apart from all sources", remedy))
    if problems:
        raise InputError(problems)


def read_files(sources: Iterable[Source], model: Located | None = None) -> ReadFiles:
    """Return the files that a merge of these sources reads, as they were before any was opened.

    Args:
        model: a merged model whose files are read beside them.
    """
    files: list[tuple[str, Path]] = []
    before: dict[Path, Stamp] = {}
    for source in sources:
        files += [(source.name, file) for file in source.files]
        for located in filter(None, (source.located, source.base)):
            before.update(located.stamps)
    if model is not None:
        files += [("model", file) for file in model.stamps if not file.name.startswith(".")]
        before.update(model.stamps)
    return ReadFiles(files, before)
