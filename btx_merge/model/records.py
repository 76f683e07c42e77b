"""The recipe in a file: one that a person wrote, or the record that a merged model carries of itself."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from btx_merge.errors import InputError, Problem
from btx_merge.files.bounded_yaml import read_yaml
from btx_merge.files.folder import checked
from btx_merge.reporting import short
from btx_merge.values import SHARD_SIZE, Rule, is_number, is_text

RECIPE_FILE = "btx_recipe.yaml"
"""What a merge writes down of itself beside its result: a recipe with everything resolved."""
RECORDS = {"resolved": "", "fits": "fitted", "training": "trained", "edits": "edited", "shared_over": ""}
"""Keys of that file that are no recipe, and what they say was done to the model since."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def read_record(folder: Path) -> dict[str, Any]:
    """Return the recipe that a merged model carries of itself; empty where it has none.

    transformers' `save_pretrained` leaves it behind. It may be anybody's, so what is computed from it is checked.

    Raises:
        InputError: it cannot be read, or holds values of another kind than `btx merge` writes; all of them.
    """
    file = folder / RECIPE_FILE
    if not os.path.lexists(file):
        return {}
    values = read_yaml(checked(file), "model", "a recipe, as `btx merge` writes it")
    problems = _odd_values(file, "", values)
    if isinstance(over := values.get("shared_over"), dict):
        problems += _odd_values(file, "shared_over.", over)
    if problems:
        raise InputError(problems)
    return values


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _are_records(value: Any) -> bool:
    return isinstance(value, list) and all(_is_object(item) for item in value)


def _is_weight(value: Any) -> bool:
    return is_number(value) and 0 <= value < float("inf")


def _are_experts(value: Any) -> bool:
    if not _is_object(value):
        return False
    for spec in value.values():
        values = spec if isinstance(spec, dict) else {"model": spec}
        has_base = values.get("base") is None or is_text(values["base"])
        if not (is_text(values.get("model")) and has_base and _is_weight(values.get("weight", 1.0))):
            return False
    return True


_KINDS: dict[str, Rule] = {
    **dict.fromkeys(("seed", "combine", "head", "expert_mode", "router_init", "tokenizer_source"), ("text", is_text)),
    **dict.fromkeys(("fold_norms", "seed_expert"), ("true or false", lambda value: isinstance(value, bool))),
    "seed_weight": ("a number of at least 0", _is_weight),
    "max_shard_size": (SHARD_SIZE[0], lambda value: is_text(value) and SHARD_SIZE[1](value)),
    "experts": ("`name: model`, or `model:`, `weight:` and `base:` below each name", _are_experts),
    **dict.fromkeys(("domain_text", "prompts", "resolved", "shared_over"), ("keys with values", _is_object)),
    **dict.fromkeys(("fits", "training", "edits"), ("a list of records", _are_records)),
}
"""What stands in a model's own recipe, as far as something is computed from it or added to it."""


def _odd_values(file: Path, prefix: str, values: Mapping[str, Any]) -> list[Problem]:
    remedy = "Copy the file again from where the model came from, or remove it: then the sources are unknown."
    problems = []
    for key, (expected, is_fine) in _KINDS.items():
        if values.get(key) is not None and not is_fine(values[key]):
            problems.append(Problem("model", f"{file}: {prefix}{key}", short(values[key]), expected, remedy))
    return problems


def is_blended(folder: Path) -> bool:
    """Return whether a model's experts are each a part of every source, and so of no domain, as its recipe says.

    Raises:
        InputError: the recipe cannot be read.
    """
    return bool(read_record(folder).get("expert_mode") == "blend")


def anchor_sources(values: Mapping[str, Any], roots: Sequence[Path]) -> dict[str, Any]:
    """Return a recipe's values with its sources' folders made absolute, seen from the first root where one is."""

    def anchored(reference: Any) -> Any:
        if not isinstance(reference, str):
            return reference
        # os.path's functions say no to a name that no file can have, where pathlib's raise
        beside = next((root / reference for root in roots if os.path.isdir(root / reference)), None)
        if beside is not None:
            return str(beside.resolve())
        is_relative = reference.startswith(("./", "../")) or reference in (".", "..")
        return os.path.abspath(roots[0] / reference) if is_relative else reference

    out = {**values, "seed": anchored(values.get("seed"))}
    if isinstance(experts := values.get("experts"), dict):
        out["experts"] = {}
        for name, spec in experts.items():
            if isinstance(spec, dict):
                folders = {key: anchored(spec[key]) for key in ("model", "base") if key in spec}
                out["experts"][name] = {**spec, **folders}
            else:
                out["experts"][name] = anchored(spec)
    return out


def append_record(folder: Path, key: str, entry: Mapping[str, Any]) -> None:
    """Add what was done with a model to the list `key` of its recipe. `update_card` says the same to a reader."""
    recipe = folder / RECIPE_FILE
    values = read_record(folder)
    values[key] = [*(values.get(key) or []), dict(entry)]
    recipe.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
