"""Folders that are no merged model: what each is, and the command to use with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btx_merge.errors import InputError, Problem
from btx_merge.files.folder import read_json
from btx_merge.model.records import RECIPE_FILE
from btx_merge.reporting import short

_EXPERT = "Make an expert of it: btx merge --seed SEED --expert NAME=MODEL."


def merged_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a merged model's folder; its values are not looked at.

    Raises:
        InputError: the folder is something else; the error says what.
    """
    if not os.path.lexists(folder / "config.json") and (problem := _without_config(folder)):
        raise InputError([problem])
    config = read_json(folder / "config.json")
    if config.get("model_type") != "btx":
        raise InputError([_other_model(folder, config)])
    return config


def _without_config(folder: Path) -> Problem | None:
    name = folder.resolve().name
    if name.endswith(".btx-partial"):
        found, remedy = "what an interrupted run has left", "Run the same command again: it completes it."
        return Problem("model", str(folder), found, "a merged model", remedy)
    if name.endswith(".btx-training"):
        found, remedy = (
            "an unfinished training",
            "Run btx train again, with --resume; or btx branch, if it was that.",
        )
        return Problem("model", str(folder), found, "a merged model", remedy)
    if os.path.lexists(folder / "adapter_config.json"):
        return _adapter(folder)
    if file := next(iter(sorted(folder.glob("*.gguf"))), None):
        remedy = "Give the merged model that it was made from; nothing leads back from a GGUF."
        return Problem("model", str(file), "a GGUF", "a merged model", remedy)
    return None


def _adapter(folder: Path) -> Problem:
    config = read_json(folder / "adapter_config.json")
    base = config.get("base_model_name_or_path")
    found = f"a PEFT adapter on {base if base and isinstance(base, str) else 'an unnamed model'}"
    if os.path.lexists(folder / RECIPE_FILE):  # btx train --train lora wrote it
        remedy = (
            "It is of a merged model. Merge it into that first: "
            "PeftModel.from_pretrained(model, ADAPTER).merge_and_unload().save_pretrained(FOLDER)."
        )
    else:
        remedy = _EXPERT.replace("MODEL", "ADAPTER")
    return Problem("model", "adapter_config.json", found, "a merged model", remedy)


def _other_model(folder: Path, config: Mapping[str, Any]) -> Problem:
    kind = config.get("model_type")
    found, is_ours = short(kind), os.path.lexists(folder / RECIPE_FILE)
    if kind == "llama" and is_ours:
        found += ", an expert that btx extract took out"
        remedy = f"Give the merged model that it was in. {_EXPERT}"
    elif kind == "llama":
        found += ", a dense Llama"
        remedy = f"Merge first. {_EXPERT}"
    elif kind == "mixtral" and is_ours:
        found += ", a model that btx export wrote for other programs"
        remedy = "Give the merged model that it was made from."
    else:
        remedy = "Merge first: btx merge makes one of Llama models."
    return Problem("model", "config.json: model_type", found, "'btx'", remedy)
