"""Files beside a model's weights that every verb writes: the model code, and the names of pictures and tables."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

PICTURE = "training.png"
ROUTING = "routing.jsonl"
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
