"""Finetuning a merged model: what to train, on which texts, with which settings of `transformers.Trainer`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from btx_merge.errors import InputError, MergeInterrupted, Problem
from btx_merge.files.changes import ReadFiles
from btx_merge.files.disk_errors import disk_error
from btx_merge.files.folder import read_json
from btx_merge.files.placing import remove, repair
from btx_merge.finetuning.launched import own_rank
from btx_merge.finetuning.recipe import TrainRecipe
from btx_merge.finetuning.work_folder import SUFFIX, begin, folder_problems, held, what_is_kept
from btx_merge.model.opening import find_model
from btx_merge.options import Options, refuse_unused
from btx_merge.reporting import Reporter
from btx_merge.sources.digest import model_digest
from btx_merge.sources.locate import Located
from btx_merge.sources.text_checks import check_texts
from btx_merge.texts.readers import is_installed
from btx_merge.texts.references import EXTRA


@dataclass(frozen=True)
class TrainReport:
    """What a finetuning did."""

    output: Path
    """The folder of the finetuned model, or of the adapter."""
    entry: Mapping[str, Any]
    """What the result's btx_recipe.yaml says about it: data, settings, steps, tokens, versions."""
    history: tuple[Mapping[str, Any], ...]
    """What was logged, step by step."""
    seconds: float
    """Wall time in seconds, checks and evaluations included."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as `--json` prints them."""
        return {"output": str(self.output), "seconds": self.seconds, **self.entry}


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
    began = time.perf_counter()
    refuse_unused(options, "train", "overwrite", "workers")
    target = Path(output).expanduser().resolve()
    work = target.with_name(target.name + SUFFIX)
    located = _check(recipe, target, work, resume, options.overwrite)
    read = ReadFiles.of_folder("model", located.stamps)
    try:
        from btx_merge.finetuning.session import Run

        run = Run(recipe, located, work, reporter)
        with held(work) if run.is_main else nullcontext():
            if run.is_main:
                repair(target, reporter.note)
                begin(work, asdict(recipe), run.settings, resume, model_digest(located.folder))
            run.wait()
            run.train(resume)
            entry = run.finish(target, options, read)
            if run.is_main:
                remove(work, reporter.note)
            run.wait()
    except (MergeInterrupted, KeyboardInterrupt):
        raise MergeInterrupted(f"Interrupted. {what_is_kept(work)}") from None
    except Exception as error:
        if changes := read.changes():
            raise InputError(changes) from error
        if isinstance(error, OSError):
            raise disk_error(error, work, what_is_kept(work)) from error
        raise
    return TrainReport(target, entry, tuple(run.history), time.perf_counter() - began)


def _check(recipe: TrainRecipe, target: Path, work: Path, resume: bool, overwrite: bool) -> Located:
    """Check all that can be known before anything heavy is imported, and return where the model lies.

    Raises:
        InputError: every reason not to train.
    """
    located, of_model = find_model(recipe.model, target, overwrite)
    problems = check_texts(recipe.data, located.folder if located else None)
    needed = ["accelerate", "matplotlib", *([] if "report_to" in recipe.arguments else ["tensorboard"])]
    missing = [package for package in needed if not is_installed(package)]
    problems += [Problem("command", package, "is not installed", "", f"{EXTRA}.") for package in missing]
    problems += of_model
    problems += folder_problems(work, resume, own_rank() == 0)
    if located:
        problems += _config_problems(recipe, read_json(located.folder / "config.json"))
    if problems or located is None:
        raise InputError(problems)
    return located


def _config_problems(recipe: TrainRecipe, config: Mapping[str, Any]) -> list[Problem]:
    """Return what the recipe asks for and a model of this config.json cannot do."""
    problems = []
    if recipe.train == "lora" and config.get("router_selection_bias"):
        found, remedy = "true: training moves the bias, and an adapter cannot hold it", "Train routers, shared or all."
        problems.append(Problem("model", "config.json: router_selection_bias", found, "false for a lora", remedy))
    if (experts := config["num_local_experts"]) % recipe.ep_size:
        found, expected = f"{recipe.ep_size} for {experts} experts", "as many experts on each rank"
        problems.append(Problem("recipe", "ep_size", found, expected, "Give another --ep-size."))
    return problems
