"""A script for a process of its own that finds out whether a folder loads where btx-merge is not installed.

It loads on the meta device, so no weights are read and none are needed: a merged model with the code that lies in the
folder, a Mixtral or a Llama with transformers alone, an adapter's config with peft.
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
import transformers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

Attempt = Callable[[str, Callable[[], Any]], Any]
"""Does something, and notes under a name what keeps it from being done; then it is None."""


def load(folder: str) -> dict[str, Any]:
    """Return all that does not load, and the tensors that the model wants of its files."""
    problems: list[list[str]] = []

    def attempt(where: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # the folder's own code may raise anything
            lines = str(error).strip().splitlines()
            problems.append([where, f"{type(error).__name__}: {lines[0] if lines else ''}"])

    if (Path(folder) / "adapter_config.json").exists():
        from peft import PeftConfig

        attempt("adapter_config.json", lambda: PeftConfig.from_pretrained(folder))
        return {"problems": problems, "tensors": None}
    raw = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    is_plain = raw.get("model_type") != "btx"
    config = attempt("config.json", lambda: AutoConfig.from_pretrained(folder, trust_remote_code=not is_plain))
    if (Path(folder) / "generation_config.json").exists():
        attempt("generation_config.json", lambda: GenerationConfig.from_pretrained(folder))
    tensors = None
    found = _plain_class(raw, problems) if is_plain else _own_class(raw, folder, problems, attempt)
    if config is not None and found is not None:
        with torch.device("meta"):
            model = attempt("the model", lambda: found(config))
        if model is not None:
            tensors = _stored(model, is_plain)
    tokenizer = attempt("tokenizer", lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=not is_plain))
    if tokenizer is not None and config is not None:
        last = max(tokenizer.get_vocab().values(), default=0)
        if last >= config.vocab_size:
            problems.append(["tokenizer", f"a token has id {last}, but the model has {config.vocab_size} rows"])
    return {"problems": problems, "tensors": tensors}


def _own_class(raw: dict[str, Any], folder: str, problems: list[list[str]], attempt: Attempt) -> Any:
    """Return the class of the folder's own code. All that its config names are tried."""
    references = raw.get("auto_map") or {}
    classes = {
        key: attempt(f"config.json: auto_map: {key}", partial(_class, reference, folder))
        for key, reference in references.items()
    }
    architecture = (raw.get("architectures") or [None])[0]
    of_architecture = [key for key, value in references.items() if value.endswith(f".{architecture}")]
    if not of_architecture:
        problems.append(["config.json: architectures", f"{architecture!r}, which auto_map does not name"])
        return None
    return classes[of_architecture[0]]


def _plain_class(raw: dict[str, Any], problems: list[list[str]]) -> Any:
    """Return the class of transformers that the config names."""
    if raw.get("auto_map"):
        problems.append(["config.json: auto_map", "is there, though the model needs no code of its own"])
    architecture = (raw.get("architectures") or [None])[0]
    found = getattr(transformers, str(architecture), None)
    if found is None:
        problems.append(["config.json: architectures", f"{architecture!r}, which transformers does not have"])
    return found


def _stored(model: Any, is_plain: bool) -> dict[str, list[int]]:
    """Return the tensors that a model's files hold: without tied ones, and under the names that it saves them by."""
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    tensors = {name: value for name, value in model.state_dict().items() if name not in tied}
    if is_plain:
        from transformers.core_model_loading import revert_weight_conversion

        tensors = revert_weight_conversion(model, tensors)
    return {name: list(value.shape) for name, value in tensors.items()}


def _class(reference: str, folder: str) -> type:
    found = get_class_from_dynamic_module(reference, folder)
    if not isinstance(found, type):
        raise TypeError(f"{reference} is no class")
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(load(sys.argv[1])), encoding="utf-8")
