"""Fitting without training: the routers of a merged model, or whatever of a new merge its recipe wants fitted."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx_merge.architectures.btx import expert_names, experts_by_domain
from btx_merge.checkpoints.copying import copy_staging, same_layout
from btx_merge.errors import InputError, Problem
from btx_merge.files.disk_errors import continuable
from btx_merge.files.folder import read_json
from btx_merge.files.placing import place_of
from btx_merge.files.scratch import move_in
from btx_merge.fitting.recipe import TEXT_ROUTERS, FitRecipe, FitTask
from btx_merge.model.card import ROUTERS_TITLE
from btx_merge.model.card_update import update_card
from btx_merge.model.files import copy_files
from btx_merge.model.held_out import Fitted, fit_tables, router_results
from btx_merge.model.opening import find_model
from btx_merge.model.records import append_record, is_blended
from btx_merge.options import Options, chosen_device, device_problems, refuse_unused
from btx_merge.reporting import Reporter
from btx_merge.sources.locate import Located
from btx_merge.sources.source import SEED
from btx_merge.sources.text_checks import check_texts, shared_text_warnings
from btx_merge.texts.references import public_record, public_reference

if TYPE_CHECKING:
    from btx_merge.model.held_out import DomainLoss, LayerFit
    from btx_merge.sources.segments import Segment
    from btx_merge.sources.source import Source


@dataclass(frozen=True)
class FitReport:
    """What a fit did."""

    output: Path
    """The folder of the model with the fitted routers."""
    layers: tuple[LayerFit, ...]
    """How each layer's router came out on held-out text; empty for prompts."""
    losses: tuple[DomainLoss, ...]
    """What each domain's held-out text costs, by the router and with every token at its own expert."""
    seconds: float
    """Wall time in seconds, checks included."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as `--json` prints them."""
        return {"output": str(self.output), "seconds": self.seconds, **Fitted(self.layers, self.losses).to_dict()}


def fit(
    recipe: FitRecipe,
    output: str | Path,
    options: Options = Options(),
    reporter: Reporter = Reporter(),
) -> FitReport:
    """Fit the routers of a merged model without training, and write the model with them into `output`.

    Args:
        options: `overwrite`, `workers`, `device` and `statistics`.

    Raises:
        InputError: a reason not to fit, a text that cannot be read, or a model that changed while it was read.
        MergeError: the disk refused, or a value is not finite; `MergeInterrupted` for Ctrl-C. The same call continues.
    """
    began = time.perf_counter()
    refuse_unused(options, "fit", "overwrite", "workers", "device", "statistics")
    target = place_of(output)
    located, problems = find_model(recipe.model, target, options.overwrite)
    problems += check_texts(recipe.domain_text, located.folder if located else None)
    problems += fit_problems(options, recipe.method, "--method ridge")
    if located:
        problems += _name_problems(recipe, located.folder)
    if problems or located is None:
        raise InputError(problems)
    for warning in shared_text_warnings(recipe.domain_text):
        reporter.warn(str(warning))

    layout = same_layout(located.folder)
    with continuable(target), copy_staging(layout, located.folder, located.stamps, target, reporter) as staging:
        staging.write(options.workers)
        try:
            task = FitTask(
                {text.name: text for text in recipe.domain_text},
                recipe.prompts,
                recipe.domain_tokens,
                router=recipe.method,
                through=recipe.fit_through,
                router_ridge=recipe.router_ridge,
            )
            fitted = fit_folder(staging.folder, located.folder, task, options, reporter)
        except InputError:
            staging.discard()  # such as a text that cannot be read: a copy of weights is soon made again
            raise
        files = staging.scratch()
        copy_files(located.folder, files)
        _record(files, recipe, fitted, located)
        move_in(files, staging.folder)
        staging.finish(options.overwrite)
    return FitReport(target, fitted.layers, fitted.losses, time.perf_counter() - began)


def fit_problems(options: Options, router: str | None, with_ridge: str) -> list[Problem]:
    """Check options of a fit: the device, and whether its routers can be solved from statistics.

    Args:
        router: how they are fitted, if they are.
        with_ridge: the command's options for the same fit with ridge routers.
    """
    problems = device_problems(options.device)
    if options.statistics and router == "logistic":
        found = f"{options.statistics}, for logistic routers, which are not solved from moments but go over all tokens"
        remedy = f"Say {with_ridge}, or leave --statistics out."
        problems.append(Problem("command", "--statistics", found, "ridge routers", remedy))
    return problems


def _name_problems(recipe: FitRecipe, folder: Path) -> list[Problem]:
    """Check that every expert has its text (or its prompts), and every text its expert."""
    if is_blended(folder):
        remedy = "Train the routers: btx train --train routers."
        return [
            Problem("model", "expert_mode", "blend: every expert is a part of all sources", "whole or split", remedy)
        ]
    domains = experts_by_domain(read_json(folder / "config.json"))
    texts = [text.name for text in recipe.domain_text]
    given, flag = (texts, "--domain-text") if recipe.method in TEXT_ROUTERS else (list(recipe.prompts), "--prompt")
    problems = [
        Problem("model", flag, f"no expert {name}", f"one of {', '.join(domains)}")
        for name in given
        if name not in domains
    ]
    missing = [name for name in domains if name not in given and name != SEED]
    if missing:
        remedy = "Give " + ", ".join(f"{flag} {name}=..." for name in missing) + "."
        expected = "for every expert but the seed, which may go without"
        problems.append(Problem("model", flag, f"none for {', '.join(missing)}", expected, remedy))
    return problems


def fit_folder(
    folder: Path,
    files: Path,
    task: FitTask,
    options: Options,
    reporter: Reporter,
    sources: Mapping[str, tuple[Source, Sequence[Segment]]] | None = None,
) -> Fitted:
    """Fit a checkpoint in `folder` in place; config and tokenizer lie in `files`.

    Args:
        sources: what shared weights are fitted to and the result is compared with, by expert: the dense source, and
            which rows of its embedding belong to which of the result's.
    """
    from btx_merge.fitting.checkpoint import Checkpoint
    from btx_merge.fitting.dense_source import DenseSource
    from btx_merge.fitting.equations import STATISTICS_FORMAT, Statistics
    from btx_merge.fitting.streams import streams_of
    from btx_merge.fitting.walk import Walk
    from btx_merge.modeling.configuration_btx import BTXConfig

    place = chosen_device(options.device)
    checkpoint = Checkpoint(folder, place)
    config = BTXConfig.from_pretrained(files)
    read = {name: [*map(public_reference, text.references), text.weight] for name, text in task.texts.items()}
    # all that the moments depend on; penalties are not among it, so that another can be tried without the texts
    key = {
        "format": STATISTICS_FORMAT,
        "model": checkpoint.digest() if options.statistics else None,  # it reads a bit of every tensor
        "experts": expert_names(config.to_dict()),
        "domain_text": read,
        "prompts": {name: list(lines) for name, lines in task.prompts.items()},
        "domain_tokens": task.domain_tokens,
        "router": task.router,
        "combine": task.combine,
        "head": task.head,
        "fit_through": task.through,
    }
    kept = Statistics(Path(os.path.expanduser(options.statistics)) if options.statistics else None, key)
    streams = streams_of(files, config, task.texts, task.prompts, task.domain_tokens)
    if short := [stream.name for stream in streams if not (stream.is_prompt or stream.holds_out)]:
        reporter.warn(
            f"domain_text: {', '.join(short)}: too little for a window of {streams[0].ids.shape[1]} tokens to be held "
            "out, so what is said of held-out text is said of text that was fitted on. Give twice as much, or more."
        )
    dense = {name: DenseSource(source, segments, place) for name, (source, segments) in (sources or {}).items()}
    walk = Walk(checkpoint, config, streams, kept, task, dense)
    fitted = walk.run(reporter)
    kept.complete()
    return fitted


def _record(folder: Path, recipe: FitRecipe, fitted: Fitted, located: Located) -> None:
    """Write into the result's recipe and card what was fitted, on what, and how it came out."""
    used: dict[str, Any] = {"prompts": {name: list(lines) for name, lines in recipe.prompts.items()}}
    if recipe.method in TEXT_ROUTERS:
        used = {"domain_text": public_record(recipe.domain_text), "domain_tokens": recipe.domain_tokens}
    if recipe.method == "ridge":
        used["router_ridge"] = recipe.router_ridge
    entry = {
        "method": recipe.method,
        **used,
        "fit_through": recipe.fit_through,
        **fitted.to_dict(),
        "tools": {name: version(name) for name in ("btx-merge", "torch", "transformers")},
    }
    text = recipe.method in TEXT_ROUTERS
    by = f"{recipe.method} regression on text of each domain" if text else "a few prompts per expert"
    table = f"\n{fit_tables(fitted)}" if fitted.layers else ""
    append_record(folder, "fits", entry)
    update_card(
        folder,
        f"{ROUTERS_TITLE}\n\nFitted without training, by {by} (`btx fit`).\n{table}",
        " Fitted since: see [below](#routers).",
        located=located,
        results=router_results(fitted.layers, [text.name for text in recipe.domain_text]),
    )
