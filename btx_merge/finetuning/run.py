"""The public verbs `train`, which finetunes a merged model, and `branch`, which makes an expert of a seed.

Both say what to train, on which texts, with which settings of `transformers.Trainer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx_merge.errors import InputError, MergeInterrupted
from btx_merge.files.changes import ReadFiles
from btx_merge.files.disk_errors import disk_error
from btx_merge.files.placing import place_of, remove, repair
from btx_merge.files.scratch import scratch_folder
from btx_merge.finetuning.checks import check_model, check_seed
from btx_merge.finetuning.recipe import BranchRecipe, Recipe, TrainRecipe
from btx_merge.finetuning.stopwatch import Stopwatch
from btx_merge.finetuning.teacher_sources import teacher_sources
from btx_merge.finetuning.work_folder import begin, held, what_is_kept, work_folder
from btx_merge.options import Options, refuse_unused
from btx_merge.reporting import Reporter
from btx_merge.sources.source import SEED

if TYPE_CHECKING:
    from btx_merge.finetuning.trainee import Trainee

_OPTIONS = ("overwrite", "workers")


@dataclass(frozen=True)
class TrainReport:
    """What a training did, of a merged model or of a branch."""

    output: Path
    """The folder of the finetuned model, or of the adapter."""
    entry: Mapping[str, Any]
    """What the result's own record says about it: data, settings, steps, tokens, versions. That is btx_recipe.yaml,
    or of a branch btx_branch.yaml."""
    history: tuple[Mapping[str, Any], ...]
    """What was logged, step by step."""
    seconds: float
    """Wall time in seconds, checks and evaluations included."""
    parts: Mapping[str, float]
    """The same by what it went into. start: imports and checks; loading: the model, and the texts that are held out;
    teachers: what they say of the steps ahead; steps: training; evaluations: of what is
    held out; checkpoints: for `resume`; writing: the result."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as `--json` prints them."""
        return {"output": str(self.output), "seconds": self.seconds, "parts": dict(self.parts), **self.entry}


def train(
    recipe: TrainRecipe,
    output: str | Path,
    options: Options = Options(),
    reporter: Reporter = Reporter(),
    *,
    resume: bool = False,
) -> TrainReport:
    """Finetune a merged model and write the result, a complete model or a LoRA adapter, into the folder `output`.

    Meanwhile checkpoints lie in `OUTPUT.btx-training`, which goes when the result is complete.

    Args:
        options: `overwrite`, and `workers` that write the result.
        resume: whether to go on where an interrupted run of the same recipe stopped.

    Raises:
        InputError: a reason not to train, or a text that cannot be read; checkpoints of the run are kept.
        NonFiniteError: training ended with values that are not finite; checkpoints are kept.
        MergeError: the disk refused; checkpoints are kept.
        MergeInterrupted: Ctrl-C or SIGTERM. Between the first step and the last, the step in work was finished and
            saved; the error's text names what is kept.
    """
    call = _Call(recipe, place_of(output), options, reporter, resume)
    refuse_unused(options, "train", *_OPTIONS)
    with ExitStack() as stack:  # what peft had to merge of a teacher stays as long as it teaches
        located = check_model(recipe, call.target, resume, options.overwrite)
        scratch: Callable[[], Path] = lambda: stack.enter_context(scratch_folder(None))  # noqa: E731
        sources = teacher_sources(recipe, located, scratch, reporter)

        def trainee() -> Trainee:
            from btx_merge.finetuning.trainee_btx import MergedTrainee

            return MergedTrainee(recipe, located, sources)

        return _carry_out(call, ReadFiles.of_folder("model", located.stamps), trainee)


def branch(
    recipe: BranchRecipe,
    output: str | Path,
    options: Options = Options(),
    reporter: Reporter = Reporter(),
    *,
    resume: bool = False,
) -> TrainReport:
    """Train a copy of a seed by itself and write the result, a dense Llama or an adapter, into the folder `output`.

    It is an expert for `merge` with the same seed. Branches know nothing of each other: each is trained when and where
    one likes (Branch-Train-MiX, arXiv 2403.07816, section 3.1).

    The other arguments, and what is raised, are those of `train`.
    """
    call = _Call(recipe, place_of(output), options, reporter, resume)
    refuse_unused(options, "branch", *_OPTIONS)
    seed = check_seed(recipe, call.target, resume, options.overwrite)

    def trainee() -> Trainee:
        from btx_merge.finetuning.trainee_llama import SeedTrainee

        return SeedTrainee(recipe, seed)

    return _carry_out(call, ReadFiles.of_folder(SEED, seed.located.stamps), trainee)


@dataclass(frozen=True)
class _Call:
    """What a verb was called with."""

    recipe: Recipe
    target: Path
    options: Options
    reporter: Reporter
    resume: bool
    watch: Stopwatch = field(default_factory=Stopwatch)


def _carry_out(call: _Call, read: ReadFiles, make_trainee: Callable[[], Trainee]) -> TrainReport:
    """Train what was checked, and write it.

    Args:
        read: the files of the model that the run begins with.
        make_trainee: imports what is needed to train that model, which takes seconds.
    """
    work = work_folder(call.target)
    try:
        from btx_merge.finetuning.session import Run

        trainee = make_trainee()
        run = Run(call.recipe, trainee, work, call.reporter, call.watch)
        with held(work, trainee.verb) if run.is_main else nullcontext():
            if run.is_main:
                repair(call.target, call.reporter.note)
                begin(work, asdict(call.recipe), run.settings, call.resume, trainee.digest())
            run.wait()
            run.train(call.resume)
            with call.watch.part("writing"):
                entry = run.finish(call.target, call.options, read)
                if run.is_main:
                    remove(work, call.reporter.note)
                run.wait()
    except (MergeInterrupted, KeyboardInterrupt):
        raise MergeInterrupted(f"Interrupted. {what_is_kept(work)}") from None
    except Exception as error:
        if changes := read.changes():
            raise InputError(changes) from error
        if isinstance(error, OSError):
            raise disk_error(error, work, what_is_kept(work)) from error
        raise
    parts = call.watch.book()
    return TrainReport(call.target, entry, tuple(run.history), sum(parts.values()), parts)
