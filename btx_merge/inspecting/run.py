"""The public verb `routing`: which expert gets which tokens of which domain, and what each expert is worth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx_merge.checkpoints.copying import NO_TENSORS, fill_copy
from btx_merge.checkpoints.staging import Staging
from btx_merge.errors import InputError, MergeInterrupted
from btx_merge.files.changes import ReadFiles
from btx_merge.files.disk_errors import continuable, naming
from btx_merge.files.folder import write_json
from btx_merge.files.placing import place_of
from btx_merge.inspecting.figures import ModelFigures
from btx_merge.inspecting.recipe import RoutingRecipe
from btx_merge.model.files import REPORT
from btx_merge.model.merged import MergedModel
from btx_merge.model.opening import open_model
from btx_merge.options import Options, chosen_device, device_problems, refuse_unused
from btx_merge.reporting import Reporter
from btx_merge.sources.text_checks import check_texts
from btx_merge.sources.tokenizer_files import no_tokenizer
from btx_merge.texts.readers import missing_packages
from btx_merge.texts.references import public_record
from btx_merge.texts.windows import length_problems

if TYPE_CHECKING:
    from btx_merge.inspecting.page_text import PageText

NUMBERS, PICTURES = "routing.json", ("routing.png", "routing.svg")
"""What a report consists of beside its page."""


@dataclass(frozen=True)
class RoutingReport:
    """What was found about a model's routing."""

    output: Path
    """The folder of the report."""
    model: ModelFigures
    """The model's figures."""
    against: ModelFigures | None
    """The second model's, without what its experts are worth."""
    seconds: float
    """Wall-clock time of the whole look, in seconds."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as `--json` prints them."""
        return {"output": str(self.output), "seconds": self.seconds, **_plain(self.model, self.against)}


def routing(
    recipe: RoutingRecipe,
    output: str | Path,
    options: Options = Options(),
    reporter: Reporter = Reporter(),
) -> RoutingReport:
    """Measure who gets which tokens, and write a page, a picture and the numbers into the folder `output`.

    Args:
        options: `overwrite` and `device`.

    Raises:
        InputError: a reason not to begin, a text that cannot be read, or a model that changed while it was read.
        NonFiniteError: a loss is not finite.
        MergeError: the disk refused; `MergeInterrupted` for Ctrl-C. The same call begins anew.
    """
    began = time.perf_counter()
    refuse_unused(options, "routing", "overwrite", "device")
    target = place_of(output)
    models = _check(recipe, target, options)
    stamps = {file: stamp for model in models for file, stamp in model.located.stamps.items()}
    read = ReadFiles([("model", file) for file in stamps], stamps)
    staging = Staging(target, NO_TENSORS, fill_copy, read, "routing", reporter=reporter)
    interrupted = MergeInterrupted("Interrupted. Nothing was written.")
    with continuable(target, "The same command begins anew.", interrupted), staging:
        from btx_merge.inspecting.session import Session

        session = Session(recipe, models, chosen_device(options.device), reporter)
        figures, texts = session.measure(0, recipe.page_tokens)
        against = session.measure(1, 0)[0] if len(models) > 1 else None
        staging.write()
        _write(staging.folder, recipe, figures, against, texts)
        staging.finish(options.overwrite)
    return RoutingReport(target, figures, against, time.perf_counter() - began)


def _plain(model: ModelFigures, against: ModelFigures | None) -> dict[str, Any]:
    return {"model": model.to_dict(), "against": against.to_dict() if against else None}


def _check(recipe: RoutingRecipe, target: Path, options: Options) -> list[MergedModel]:
    """Check all that can be known before anything heavy is imported. The models, opened."""
    models, problems = [], []
    references = [("model", recipe.model), *([("against", recipe.against)] if recipe.against else [])]
    for name, reference in references:
        model, found = open_model(reference, target, options.overwrite)
        problems += [replace(problem, source=name) if problem.source == "model" else problem for problem in found]
        if model is None:
            continue
        models.append(model)
        problems += no_tokenizer(name, model.located.folder)
        problems += length_problems("window", recipe.window, model.config, name)
    problems += check_texts(recipe.data, models[0].located.folder if models else None)
    problems += device_problems(options.device) + missing_packages("matplotlib")
    if problems:
        raise InputError(dict.fromkeys(problems))  # what is wrong with the output is found with each model
    return models


def _write(
    folder: Path,
    recipe: RoutingRecipe,
    model: ModelFigures,
    against: ModelFigures | None,
    texts: Sequence[PageText],
) -> None:
    """Write the page, the picture in two formats, and the numbers."""
    from btx_merge.inspecting.page import page_html
    from btx_merge.inspecting.picture import figure_of

    names = ("tokens", "window", "batch_size", "dtype", "ablation")
    used = {"data": public_record(recipe.data), **{name: getattr(recipe, name) for name in names}}
    write_json(folder / NUMBERS, {"recipe": used, **_plain(model, against)})
    figure = figure_of([model, *([against] if against else [])])
    for name in PICTURES:
        with naming(folder / name):
            figure.savefig(folder / name, dpi=150)
    page = folder / REPORT
    with naming(page):
        page.write_text(page_html(model, against, texts), encoding="utf-8")
