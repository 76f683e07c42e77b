"""The recipe of `btx check` and `btx merge`: from a file and from flags, which win."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btx_merge.cli.printing import Lines
from btx_merge.cli.takes import Given, add_to_experts
from btx_merge.errors import InputError, Problem
from btx_merge.merging.recipe import MergeRecipe
from btx_merge.merging.recipe_file import read_recipe_file
from btx_merge.merging.template import recipe_template
from btx_merge.sources.source import SEED


@dataclass(frozen=True)
class GivenRecipe:
    """What the user gave of a recipe, by a file and by flags, not validated yet."""

    values: Mapping[str, Any]
    origin: str
    """The file, or the command, as errors name it."""
    given: Given
    """What of it was given by flags."""
    problems: tuple[Problem, ...]
    """Flags that do not fit together."""

    def build(self) -> MergeRecipe:
        """Return the recipe.

        Raises:
            InputError: values that cannot be meant, all of them, under the names that the user typed.
        """
        problems = list(self.problems)
        try:
            recipe = MergeRecipe.from_dict(self.values, self.origin)
        except InputError as error:
            problems += [self.given.as_typed(problem) for problem in error.problems]
        if problems:
            raise InputError(problems)
        return recipe

    def template(self) -> str:
        """Return a recipe file with these values, and the default of every other option.

        Raises:
            InputError: values that were given and cannot be meant. What is missing is left to be filled in.
        """
        try:
            self.build()
        except InputError as error:
            given = {*self.values, *self.given.flags.values()}
            problems = [
                problem
                for problem in error.problems
                if problem in self.problems or problem.where.split(".")[0] in given
            ]
            if problems:
                raise InputError(problems) from None
        return recipe_template(self.values)


def given_recipe(file: Path | None, given: Given) -> GivenRecipe:
    """Return the values of a recipe file, and over them those of the flags."""
    new = given.values
    if "domain_text" in new:
        new["domain_text"] = {text.name: text for text in new["domain_text"]}
    models, weights = new.pop("experts", {}), new.get("weight", {})
    named = {*models, *new.get("base", {}), *({SEED} & new.keys())}
    values = read_recipe_file(file, Lines(), named.__contains__) if file else {}
    if SEED in weights:
        new["seed_weight"] = weights.pop(SEED)
        given.flags["seed_weight"] = f"--weight {SEED}"
    problems = _add_experts(values, models, given)
    for name, value in new.items():
        before = values.get(name)
        values[name] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    return GivenRecipe(values, str(file or "command"), given, tuple(problems))


def _add_experts(values: dict[str, Any], models: Mapping[str, str], given: Given) -> list[Problem]:
    """Put the experts of `--expert`, `--weight` and `--base` into a recipe's values; return what does not fit."""
    experts = values.get("experts") or {}
    if not isinstance(experts, dict):
        given.values.pop("weight", None)
        given.values.pop("base", None)
        return []  # the recipe says what is wrong with it
    experts = {name: dict(spec) if isinstance(spec, dict) else {"model": spec} for name, spec in experts.items()}
    if experts or models:  # where there is none, none was given: a template leaves them to be filled in
        values["experts"] = experts
    for name, model in models.items():
        experts.setdefault(name, {})["model"] = model
        given.flags.update({f"experts.{name}{key}": f"--expert {name}" for key in ("", ".model")})
    return add_to_experts({"experts": experts}, given, "expert")
