"""Checks of an adapter that is to be published: its base must be a model that whoever downloads it can load too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btx_merge.checkpoints.stored import StoredTensor
from btx_merge.checkpoints.tensor_files import read_tensor_file
from btx_merge.errors import InputError, Problem
from btx_merge.files.folder import is_plain_name, read_json
from btx_merge.model.adapter_card import with_base
from btx_merge.publishing.card import HUB_ID
from btx_merge.publishing.kinds import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_BASE = "base_model_name_or_path"
_SAVE_AGAIN = "Train or save the adapter again."


def published_adapter(folder: Path, card: str, base_model: str | None) -> tuple[dict[str, str], list[Problem]]:
    """Return the files that are published otherwise than they lie there, with their text; and what is wrong.

    Args:
        card: README.md as it will be published, but for what it says of the base.
        base_model: `org/name` or `org/name@revision` where another name than the recorded one is to be published.
    """
    try:
        config = read_json(folder / ADAPTER_CONFIG)
    except InputError as error:
        return {}, [Problem("model", ADAPTER_CONFIG, problem.found, problem.expected) for problem in error.problems]
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(Problem("model", f"{ADAPTER_CONFIG}: peft_type", repr(config.get("peft_type")), "'LORA'"))
    try:
        problems += _tensor_problems(read_tensor_file(folder / ADAPTER_WEIGHTS))
    except InputError as error:
        problems += [Problem("model", ADAPTER_WEIGHTS, one.found, one.expected, one.remedy) for one in error.problems]
    base, revision = config.get(_BASE), config.get("revision")
    if base_model is not None:
        base, _, revision = base_model.partition("@")
        revision = revision or None
    where = "--base-model" if base_model is not None else f"{ADAPTER_CONFIG}: {_BASE}"
    if not isinstance(base, str) or not HUB_ID.fullmatch(base) or not all(map(is_plain_name, base.split("/"))):
        remedy = "Publish its base first, and give the base's id: --base-model org/name."
        problems.append(Problem("model", where, repr(base), "the base's id on the Hub, org/name", remedy))
        return {ADAPTER_CONFIG: _text({**config, _BASE: None})}, problems  # the path in it is told of once
    changed = {"README.md": with_base(card, base, revision)}
    if (base, revision) != (config.get(_BASE), config.get("revision")):
        changed[ADAPTER_CONFIG] = _text({**config, _BASE: base, "revision": revision})
    return changed, problems


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2) + "\n"


def _tensor_problems(tensors: Mapping[str, StoredTensor]) -> list[Problem]:
    """Return whether the weights are pairs of matrices of one rank, with nothing else beside them."""
    lora = {name: tensor for name, tensor in tensors.items() if ".lora_A." in name or ".lora_B." in name}
    problems = []
    if not lora:
        problems.append(Problem("model", ADAPTER_WEIGHTS, "no LoRA", "pairs of lora_A and lora_B", _SAVE_AGAIN))
    for name, tensor in lora.items():
        first = ".lora_A." in name
        other = name.replace(".lora_A.", ".lora_B.") if first else name.replace(".lora_B.", ".lora_A.")
        if other not in lora:
            problems.append(Problem("model", ADAPTER_WEIGHTS, f"{name} is there without {other}", "", _SAVE_AGAIN))
        elif first and (len(tensor.shape) != 2 or tensor.shape[0] != lora[other].shape[-1]):
            found = f"{name} is {list(tensor.shape)}, and {other} {list(lora[other].shape)}"
            problems.append(Problem("model", ADAPTER_WEIGHTS, found, "one rank", _SAVE_AGAIN))
    return problems
