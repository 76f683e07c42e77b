"""btx-merge: fine-tuned Llama checkpoints into one Mixture of Experts, by Branch-Train-MiX (arXiv 2403.07816).

Importing this package makes transformers' Auto classes load merged models without `trust_remote_code`. It imports next
to nothing: a public name imports its module when it is first used. So `btx` answers Ctrl-C from the beginning.
"""

from __future__ import annotations

import importlib

from btx_merge._auto_classes import register_with_transformers

TYPE_CHECKING = False  # type checkers take it for true; `typing` itself would be half of the time that is needed here
if TYPE_CHECKING:
    from btx_merge.editing.recipe import EditRecipe
    from btx_merge.editing.run import EditReport, edit
    from btx_merge.errors import BTXError, InputError, MergeError, MergeInterrupted, NonFiniteError, Problem
    from btx_merge.evaluation.btm import BranchTrainMerge
    from btx_merge.evaluation.recipe import EvalRecipe
    from btx_merge.evaluation.report import EvalReport
    from btx_merge.evaluation.run import evaluate
    from btx_merge.exporting.run import ExportReport, export, extract
    from btx_merge.finetuning.recipe import BranchRecipe, TrainRecipe
    from btx_merge.finetuning.run import TrainReport, branch, train
    from btx_merge.fitting.recipe import FitRecipe
    from btx_merge.fitting.run import FitReport, fit
    from btx_merge.inspecting.recipe import RoutingRecipe
    from btx_merge.inspecting.run import RoutingReport, routing
    from btx_merge.merging.recipe import MergeRecipe
    from btx_merge.merging.run import Check, Report, check, merge
    from btx_merge.model.info import ModelInfo, info
    from btx_merge.options import Options
    from btx_merge.publishing.run import PushReport, push
    from btx_merge.reporting import Reporter
    from btx_merge.sources.source import ExpertSpec
    from btx_merge.texts.references import DomainText

__version__ = "0.1.0"
__all__ = [
    "BTXError",
    "BranchRecipe",
    "BranchTrainMerge",
    "Check",
    "DomainText",
    "EditRecipe",
    "EditReport",
    "EvalRecipe",
    "EvalReport",
    "ExpertSpec",
    "ExportReport",
    "FitRecipe",
    "FitReport",
    "InputError",
    "MergeError",
    "MergeInterrupted",
    "MergeRecipe",
    "ModelInfo",
    "NonFiniteError",
    "Options",
    "Problem",
    "PushReport",
    "Report",
    "Reporter",
    "RoutingRecipe",
    "RoutingReport",
    "TrainRecipe",
    "TrainReport",
    "branch",
    "check",
    "edit",
    "evaluate",
    "export",
    "extract",
    "fit",
    "info",
    "merge",
    "push",
    "routing",
    "train",
]

_HOMES = {
    "editing.recipe": ("EditRecipe",),
    "editing.run": ("EditReport", "edit"),
    "errors": ("BTXError", "InputError", "MergeError", "MergeInterrupted", "NonFiniteError", "Problem"),
    "evaluation.btm": ("BranchTrainMerge",),
    "evaluation.recipe": ("EvalRecipe",),
    "evaluation.report": ("EvalReport",),
    "evaluation.run": ("evaluate",),
    "exporting.run": ("ExportReport", "export", "extract"),
    "finetuning.recipe": ("BranchRecipe", "TrainRecipe"),
    "finetuning.run": ("TrainReport", "branch", "train"),
    "fitting.recipe": ("FitRecipe",),
    "fitting.run": ("FitReport", "fit"),
    "inspecting.recipe": ("RoutingRecipe",),
    "inspecting.run": ("RoutingReport", "routing"),
    "merging.recipe": ("MergeRecipe",),
    "merging.run": ("Check", "Report", "check", "merge"),
    "model.info": ("ModelInfo", "info"),
    "options": ("Options",),
    "publishing.run": ("PushReport", "push"),
    "reporting": ("Reporter",),
    "sources.source": ("ExpertSpec",),
    "texts.references": ("DomainText",),
}
"""The module in which each public name is at home."""


if not TYPE_CHECKING:  # where it is true, a name that does not exist would pass unseen

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used (PEP 562).

        Raises:
            AttributeError: the package has no such name.
        """
        home = next((module for module, names in _HOMES.items() if name in names), None)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"btx_merge.{home}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


register_with_transformers()
