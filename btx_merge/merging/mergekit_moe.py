"""Recipes of mergekit-moe: the same experts around the same base, as far as BTX has what the file asks for.

mergekit-moe takes everything but the feed-forward blocks from `base_model`, which is an expert only if it is listed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from btx_merge.errors import InputError, Problem
from btx_merge.reporting import Reporter, short
from btx_merge.sources.source import SEED
from btx_merge.values import is_text, unknown_problems

_KEYS = ("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts", "architecture")
_EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
_BY_PROMPTS = ("hidden", "hidden_avg", "hidden_last")
_GATE_MODES = (*_BY_PROMPTS, "random", "uniform_random")
_LEAVE_OUT = "Leave it out."


def is_mergekit(values: Mapping[str, Any]) -> bool:
    """Return whether a file's values are mergekit's and not ours."""
    return "seed" not in values and ("base_model" in values or "merge_method" in values)


def from_mergekit(values: Mapping[str, Any], origin: str, reporter: Reporter = Reporter()) -> dict[str, Any]:
    """Return the values of a recipe that says what a file of mergekit-moe says.

    Args:
        origin: the file, as errors and notes name it.
        reporter: is told how it was translated, and what was left out.

    Raises:
        InputError: what BTX does not have, or what mergekit-moe would not take either; all of it.
    """
    if "merge_method" in values or "slices" in values:
        found = "a file of mergekit, for a merge into a dense model"
        remedy = "Write `seed:` and `experts:`; btx merge --print-recipe prints a file to start from."
        raise InputError([Problem(origin, "merge_method", found, "a recipe, or a file of mergekit-moe", remedy)])
    file = _File(values, origin)
    recipe = file.translated()
    if file.problems:
        raise InputError(file.problems)
    reporter.note(f"{origin} is a file of mergekit-moe, read as: {'; '.join(file.notes)}.")
    return recipe


@dataclass
class _File:
    values: Mapping[str, Any]
    origin: str
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def translated(self) -> dict[str, Any]:
        values = self.values
        self.problems += unknown_problems(self.origin, values, _KEYS)
        base, mode = values.get("base_model"), values.get("gate_mode", "hidden")
        if not is_text(base) or not base:
            self._refuse("base_model", short(base), "a folder or org/name", "")
            base = ""
        if _parts(base)[1]:  # mergekit's `model+adapter`
            remedy = "Merge the adapter into the base first (merge_and_unload, save_pretrained)."
            self._refuse("base_model", f"{base}, an adapter", "a whole model", remedy)
        if mode == "cheap_embed":
            found = "cheap_embed: one router for all layers, of embeddings that no layer but the first reads"
            self._refuse("gate_mode", found, "", "Say hidden, which reads the prompts layer by layer, or random.")
        elif mode not in _GATE_MODES:
            self._refuse("gate_mode", short(mode), f"one of {', '.join(_GATE_MODES)}", "")
        if values.get("shared_experts"):
            found = "experts that every token passes through"
            self._refuse("shared_experts", found, "", f"BTX has none. {_LEAVE_OUT}")
        if values.get("architecture") is not None:
            self.notes.append("architecture left out (btx export writes a Mixtral)")
        self.notes += [f"the seed is {base}", "its attention, embeddings and norms are kept (combine: seed)"]
        recipe = {"seed": base, "combine": "seed", **self._experts(base, mode in _BY_PROMPTS), **self._routers(mode)}
        recipe["num_experts_per_tok"] = values.get("experts_per_token", 2)
        if (dtype := values.get("dtype")) is not None:
            recipe["dtype"] = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
        return recipe

    def _routers(self, mode: Any) -> dict[str, Any]:
        if mode in _BY_PROMPTS:
            self.notes.append(
                f"gate_mode {mode} is router_init: prompts, which averages over a prompt's tokens, behind the norm"
            )
            return {"router_init": "prompts"}
        self.notes.append(f"gate_mode {mode} is router_init: random")
        if mode == "random":
            return {"router_init": "random", "router_std": 1.0}  # as there: the deviation is 1
        self.notes[-1] += ", normal and not uniform"
        return {"router_init": "random"}

    def _experts(self, base: str, by_prompts: bool) -> dict[str, Any]:
        given = self.values.get("experts")
        if not isinstance(given, list) or not given:
            self._refuse("experts", short(given), "a list with `source_model:` and `positive_prompts:` of each", "")
            given = []
        experts: dict[str, Any] = {}
        prompts: dict[str, Any] = {}
        for number, spec in enumerate(given):
            where = f"experts[{number}]"
            model = spec.get("source_model") if isinstance(spec, dict) else None
            if not is_text(model) or not model:
                self._refuse(where, short(spec), "`source_model: folder or org/name`", "")
                continue
            self.problems += unknown_problems(self.origin, spec, _EXPERT_KEYS, f"{where}.")
            self._refuse_factors(spec, where)
            if model == base and SEED not in prompts:
                name = SEED
                if number:
                    self.notes.append("the base is expert 0")
            else:
                name = _name(model, experts)
                path, lora = _parts(model)
                experts[name] = {"model": lora, "base": path} if lora and path != base else {"model": lora or path}
                self.notes.append(f"expert {name} is {model}")
            prompts[name] = spec.get("positive_prompts") or []
            if by_prompts and not prompts[name]:
                self._refuse(f"{where}.positive_prompts", "missing", "lines typical of the expert", "")
            if by_prompts and spec.get("negative_prompts"):
                self.notes.append(f"negative_prompts of {name} left out")
        recipe: dict[str, Any] = {"experts": experts, "seed_expert": SEED in prompts}
        return {**recipe, "prompts": prompts} if by_prompts else recipe

    def _refuse_factors(self, spec: Mapping[str, Any], where: str) -> None:
        for key, neutral in (("noise_scale", 0), ("residual_scale", 1)):
            if (value := spec.get(key)) is not None and value != neutral:
                remedy = f"BTX keeps an expert's weights as they are. {_LEAVE_OUT}"
                self._refuse(f"{where}.{key}", short(value), "", remedy)

    def _refuse(self, where: str, found: str, expected: str, remedy: str) -> None:
        self.problems.append(Problem(self.origin, where, found, expected, remedy))


def _parts(reference: str) -> tuple[str, str]:
    """Return the model and the adapter of `model+adapter`; an empty adapter where there is none.

    A folder that has a plus in its name is one.
    """
    if os.path.isdir(reference):  # pathlib raises for a name that no file can have
        return reference, ""
    model, _, lora = reference.partition("+")
    return model, lora


def _name(reference: str, taken: Mapping[str, Any]) -> str:
    """Return a name for an expert: the last part of its path, as a recipe's names may be, and once only."""
    last = (_parts(reference)[1] or reference).rstrip("/").rpartition("/")[2].partition("@")[0]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", last).lstrip("_.-") or "expert"
    candidates = (name, *(f"{name}-{number}" for number in range(2, len(taken) + 4)))
    return next(candidate for candidate in candidates if candidate != SEED and candidate not in taken)
