"""What is to be changed in a merged model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from btx_merge.errors import InputError, Problem, collecting
from btx_merge.fitting.recipe import TEXT_ROUTERS
from btx_merge.reporting import short
from btx_merge.sources.source import ExpertSpec, as_spec
from btx_merge.texts.references import DomainText, as_domain_texts
from btx_merge.values import (
    ABOVE_ZERO,
    RANDOM_SEED,
    Rule,
    at_least,
    is_text,
    mapping_problems,
    one_of,
    parse_field,
    value_problems,
)

SHARED_UPDATES = ("auto", "update", "keep")
ROW_INITS = (*TEXT_ROUTERS, "random", "zeros")
"""Ways to a router row of a new expert."""


@dataclass(frozen=True)
class EditRecipe:
    """Everything that determines an edit: experts that go, come, are replaced or get another name.

    Experts and texts may be given as in `MergeRecipe`.

    Raises:
        InputError: values that cannot be meant; all of them in one error.
    """

    model: str
    """A merged checkpoint: a folder, `org/name` or `org/name@revision`."""
    drop: tuple[str, ...] = ()
    """Experts that go. If seed is among them, the seed is no expert any more."""
    add: Mapping[str, ExpertSpec] = field(default_factory=dict)
    """Models that become experts, behind those that there are: checkpoints or PEFT adapters."""
    replace: Mapping[str, ExpertSpec] = field(default_factory=dict)
    """Models whose feed-forward blocks take the place of an expert's."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """New names of experts."""
    shared: str = "auto"
    """What becomes of attention, embeddings, norms and head. update: they move as if the new set of experts had
    been merged, for which every source of both sets is read; keep: they stay; auto: update if all these sources
    are there."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where sources of the model's own recipe lie now, if they have moved."""
    router_init: str | None = None
    """Router rows of new experts. logistic, ridge: fitted on `domain_text`, by logistic or ridge regression; random:
    normal with `router_std`; zeros: all 0. By default logistic where there is text of an expert that stays, too, and
    ridge where there is text of new ones alone. Without text, random for an added expert, and the row that was there
    for a replaced one."""
    router_std: float | None = None
    """Standard deviation of random rows, above 0. By default the model's initializer_range."""
    random_seed: int = 0
    """Seed of random rows, in [0, 2**32)."""
    domain_text: tuple[DomainText, ...] = ()
    """Text of each new expert's domain: a file, a folder, a glob or a dataset of the Hub. Text of experts that stay
    shows how much of a new row is too much."""
    domain_tokens: int = 200_000
    """Tokens that are read of each domain, from the beginning of its text; at least 64."""
    router_ridge: float = 0.001
    """ridge: penalty on the router's weights, relative to the mean square of its input; above 0."""
    num_experts_per_tok: int | None = None
    """Experts that each token is sent to from now on, at least 1. By default as many as before."""
    allow_nonfinite: bool = False
    """Go on even if a source holds NaN or Inf."""
    allow_unrelated: bool = False
    """Go on even if a source does not seem to have grown from the seed."""

    def __post_init__(self) -> None:
        problems = value_problems(self, RULES) + _kind_problems(self)
        if not problems:
            problems += _change_problems(self)
        problems += parse_field(self, "domain_text", as_domain_texts)
        if not problems and self.router_ridge != EditRecipe.router_ridge and self.router_init != "ridge":
            found = f"{self.router_ridge:g}, which rows that are not by ridge regression do not use"
            problems.append(Problem("recipe", "router_ridge", found, "", "Say router_init: ridge, or leave it out."))
        for key in ("add", "replace"):
            specs, given = {}, getattr(self, key)
            for name, spec in given.items() if isinstance(given, Mapping) else ():
                with collecting(problems):
                    specs[name] = as_spec(name, spec, key)
            object.__setattr__(self, key, specs)
        if problems:
            raise InputError(problems)

    @property
    def is_rename_only(self) -> bool:
        """Whether no expert comes or goes."""
        return not (self.drop or self.add or self.replace)


RULES: dict[str, Rule] = {
    "model": ("a merged checkpoint", bool),
    "shared": one_of(SHARED_UPDATES),
    "router_init": one_of(ROW_INITS),
    "router_std": ABOVE_ZERO,
    "random_seed": RANDOM_SEED,
    "domain_tokens": at_least(64),
    "router_ridge": ABOVE_ZERO,
    "num_experts_per_tok": at_least(1),
}


def _kind_problems(recipe: EditRecipe) -> list[Problem]:
    """Return which of the lists and mappings are something else."""
    problems = []
    drop = recipe.drop
    if not isinstance(drop, Sequence) or isinstance(drop, str) or not all(is_text(name) for name in drop):
        problems.append(Problem("recipe", "drop", short(drop), "names of experts"))
    for key in ("add", "replace"):
        if not isinstance(getattr(recipe, key), Mapping):
            problems.append(Problem("recipe", key, short(getattr(recipe, key)), "`name: model`"))
    problems += mapping_problems("rename", recipe.rename, "`name: new name`")
    return problems + mapping_problems("sources", recipe.sources, "`name: model`")


def _change_problems(recipe: EditRecipe) -> list[Problem]:
    """Return which changes do not go together."""
    problems = []
    if recipe.is_rename_only and not recipe.rename:
        problems.append(Problem("recipe", "drop, add, replace, rename", "nothing to change", "at least one of them"))
    named = [*dict.fromkeys(recipe.drop), *recipe.replace, *recipe.rename]
    for name in sorted({name for name in named if named.count(name) > 1}):
        problems.append(Problem("recipe", name, "dropped, replaced and renamed at once", "one of these"))
    for old, new in recipe.rename.items():
        with collecting(problems):
            as_spec(new, "a model", "rename")
        if old == new:
            problems.append(Problem("recipe", f"rename.{old}", f"{new}", "another name"))
    return problems
