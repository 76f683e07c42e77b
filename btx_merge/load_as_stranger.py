"""A script, run in a process of its own: does a folder load where btx-merge is not installed?

It loads with the code that lies in the folder, on the meta device, so no weights are read and none are needed.
Writes JSON into a file, for the folder's code may print: {"problems": [[file or key, what was found], ...], "tensors":
{name: shape}, or null}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module


def load(folder: str) -> dict[str, Any]:
    """All that does not load, and the tensors that the model wants of its files."""
    problems: list[list[str]] = []

    def attempt(where: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # the folder's own code may raise anything
            lines = str(error).strip().splitlines()
            problems.append([where, f"{type(error).__name__}: {lines[0] if lines else ''}"])

    raw = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    references = raw.get("auto_map") or {}
    classes = {
        key: attempt(f"config.json: auto_map: {key}", partial(_class, reference, folder))
        for key, reference in references.items()
    }
    config = attempt("config.json", lambda: AutoConfig.from_pretrained(folder, trust_remote_code=True))
    architecture = (raw.get("architectures") or [None])[0]
    of_architecture = [key for key, value in references.items() if value.endswith(f".{architecture}")]
    tensors = None
    if not of_architecture:
        problems.append(["config.json: architectures", f"{architecture!r}, which auto_map does not name"])
    elif config is not None and classes[of_architecture[0]] is not None:
        with torch.device("meta"):
            model = attempt("the model", lambda: classes[of_architecture[0]](config))
        if model is not None:
            tied = set(getattr(model, "all_tied_weights_keys", {}))
            tensors = {name: list(value.shape) for name, value in model.state_dict().items() if name not in tied}
    tokenizer = attempt("tokenizer", lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=True))
    if tokenizer is not None and config is not None:
        last = max(tokenizer.get_vocab().values(), default=0)
        if last >= config.vocab_size:
            problems.append(["tokenizer", f"a token has id {last}, but the model has {config.vocab_size} rows"])
    return {"problems": problems, "tensors": tensors}


def _class(reference: str, folder: str) -> type:
    found = get_class_from_dynamic_module(reference, folder)
    if not isinstance(found, type):
        raise TypeError(f"{reference} is no class")
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(load(sys.argv[1])), encoding="utf-8")
