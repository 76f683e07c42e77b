"""The router rows of a model that nobody has trained or fitted yet, by what its recipe records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from btx_merge.architectures.btx import expert_names, experts_by_domain

_UNTRAINED = ("random", "zeros")


def trainings(values: Mapping[str, Any]) -> int:
    """Return how often the recipe says that all routers were fitted or trained since the merge."""
    return len(entries(values, "fits")) + len(whole_trainings(values))


def whole_trainings(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the trainings that changed the model; one of an adapter leaves it as it is."""
    return [entry for entry in entries(values, "training") if entry.get("train") != "lora"]


def untrained_experts(values: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Return the experts whose router rows are random or zeros, still.

    Args:
        values: btx_recipe.yaml.
        config: config.json of the model as it is now, which names its experts.
    """
    is_random = values.get("router_init") in _UNTRAINED
    own: dict[str, bool] = {}  # of experts that an edit brought
    done = 0
    for entry in entries(values, "edits"):
        before = entry.get("trainings_before")
        before = before if isinstance(before, int) else 0
        if before > done:  # a training between two edits reached every row that was there
            is_random, own, done = False, {}, before
        renamed = _mapping(entry, "rename")
        own = {str(renamed.get(name, name)): is_new_random for name, is_new_random in own.items()}
        for name, init in _mapping(entry, "router_rows").items():
            if init != "kept":
                own[name] = init in _UNTRAINED
    if trainings(values) > done:  # one came after the last edit
        return []
    names = expert_names(config)
    domains = experts_by_domain(config).items()
    return [names[number] for domain, numbers in domains if own.get(domain, is_random) for number in numbers]


def _mapping(entry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a mapping of a recipe, which anybody may have written; empty where it is none."""
    given = entry.get(key)
    return given if isinstance(given, Mapping) else {}


def entries(values: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """Return the objects in a list of a recipe; none where it is no list."""
    given = values.get(key)
    return [entry for entry in given if isinstance(entry, Mapping)] if isinstance(given, list) else []
