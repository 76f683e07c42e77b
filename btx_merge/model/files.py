"""Files beside a model's weights: copied from the model that a result is made of, and those that every verb writes."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from btx_merge.files.folder import copy_file, small_files
from btx_merge.sources.tokenizer_files import copy_templates

PICTURE = "training.png"
ROUTING = "routing.jsonl"
REPORT = "report.html"
EVALUATION = "eval.png"
BRANCH = "btx_branch.yaml"
"""The record of a branch: its seed, its data, all settings of the run."""
MODEL_CODE = ("configuration_btx.py", "experts_btx.py", "modeling_btx.py", "routing_btx.py")


def model_code_folder() -> Path:
    """Return the folder of the code that travels with a checkpoint, found without importing it (and torch).

    Raises:
        ImportError: the package is installed without it.
    """
    spec = importlib.util.find_spec("btx_merge.modeling")
    if spec is None or spec.origin is None:
        raise ImportError(
            "btx_merge.modeling is missing, and with it the code of every model: install btx-merge again."
        )
    return Path(spec.origin).parent


def copy_model_code(folder: Path) -> None:
    """Add what is missing of the code that travels with a checkpoint: a model from the Hub comes without."""
    for name in MODEL_CODE:
        if not (folder / name).exists():
            shutil.copyfile(model_code_folder() / name, folder / name)


def copy_files(model: Path, folder: Path, leaving_out: str = "") -> None:
    """Copy what a model has beside its weights, and add what is missing of the code that travels with it.

    Args:
        leaving_out: a file that the caller writes itself.

    Raises:
        InputError: a file that may not be copied.
    """
    for name, file in small_files(model).items():
        if name != leaving_out:
            copy_file(file, folder / name)
    copy_templates(model, folder)
    copy_model_code(folder)
