"""btx-merge: fine-tuned Llama checkpoints into one Mixture of Experts, by Branch-Train-MiX (arXiv 2403.07816).

Importing this package makes transformers' Auto classes load merged models without `trust_remote_code`.
"""

from btx_merge._auto_classes import register_with_transformers
from btx_merge.edit_recipe import EditRecipe
from btx_merge.editing import EditReport, edit
from btx_merge.errors import BTXError, InputError, MergeError, MergeInterrupted, NonFiniteError, Problem
from btx_merge.exporting import ExportReport, export, extract
from btx_merge.finetuning import TrainRecipe, TrainReport, train
from btx_merge.fitting import FitRecipe, FitReport, fit
from btx_merge.merging import Check, Report, check, merge
from btx_merge.model_info import ModelInfo, info
from btx_merge.publishing import PushReport, push
from btx_merge.recipe import ExpertSpec, MergeRecipe
from btx_merge.texts import DomainText

__version__ = "0.1.0"
__all__ = [
    "BTXError",
    "Check",
    "DomainText",
    "EditRecipe",
    "EditReport",
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
    "Problem",
    "PushReport",
    "Report",
    "TrainRecipe",
    "TrainReport",
    "check",
    "edit",
    "export",
    "extract",
    "fit",
    "info",
    "merge",
    "push",
    "train",
]

register_with_transformers()
