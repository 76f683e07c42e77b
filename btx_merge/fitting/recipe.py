"""The recipe of a fit: what determines the routers and shared weights of a merged model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from btx_merge.errors import InputError, Problem
from btx_merge.texts.references import DomainText, as_domain_texts, as_prompts
from btx_merge.values import ABOVE_ZERO, Rule, at_least, one_of, parse_field, value_problems

FIT_THROUGH = ("expert", "router")
TEXT_ROUTERS = ("ridge", "logistic")
"""Routers that are fitted on text of each domain."""
ROUTER_FITS = (*TEXT_ROUTERS, "prompts")
"""Routers that are fitted, without training."""


RULES: dict[str, Rule] = {
    "model": ("a merged checkpoint", bool),
    "method": one_of(ROUTER_FITS),
    "domain_tokens": at_least(64),
    "router_ridge": ABOVE_ZERO,
    "fit_through": one_of(FIT_THROUGH),
}


@dataclass(frozen=True)
class FitRecipe:
    """Everything that determines a fit of an existing model's routers. Texts may be a mapping as in `MergeRecipe`.

    Raises:
        InputError: values that cannot be meant; all of them in one error.
    """

    model: str
    """A merged checkpoint: a folder, `org/name` or `org/name@revision`."""
    method: str = "logistic"
    """How routers are fitted. logistic, ridge: on `domain_text`, by multinomial logistic or by ridge regression;
    prompts: on `prompts`."""
    domain_text: tuple[DomainText, ...] = ()
    """Text of each expert's domain, for ridge and logistic: a file, a folder, a glob or a dataset of the Hub. The seed
    may go without."""
    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """A few typical lines of each expert, for the method prompts."""
    domain_tokens: int = 200_000
    """Tokens that are read of each domain, from the beginning of its text; at least 64."""
    router_ridge: float = 0.001
    """ridge: penalty on the router's weights, relative to the mean square of its input; above 0."""
    fit_through: str = "expert"
    """Experts that tokens pass on the way to the next layer during a fit. expert: their own domain's; router:
    those that the fitted router chooses."""

    def __post_init__(self) -> None:
        problems = value_problems(self, RULES)
        problems += parse_field(self, "domain_text", as_domain_texts)
        problems += parse_field(self, "prompts", as_prompts)
        unused = "prompts" if self.method in TEXT_ROUTERS else "domain_text"
        if getattr(self, unused):
            problems.append(Problem("recipe", unused, f"given, but method {self.method} does not use it"))
        if not problems and self.method != "ridge" and self.router_ridge != FitRecipe.router_ridge:
            found = f"{self.router_ridge:g}, which method {self.method} does not use"
            problems.append(Problem("recipe", "router_ridge", found, "", "Say method: ridge, or leave it out."))
        if problems:
            raise InputError(problems)


@dataclass(frozen=True)
class FitTask:
    """What is fitted in a checkpoint, on what, and how. Each verb that fits says it in this form."""

    texts: Mapping[str, DomainText]
    prompts: Mapping[str, Sequence[str]]
    domain_tokens: int
    router: str | None
    """One of `ROUTER_FITS`, or None for routers that stay."""
    combine: str | None = None
    """regmean, regmean_merged, or None for shared weights that stay."""
    head: str | None = None
    """fitted, for a head whose rows are weighed by frequency; None for one that `combine` gives."""
    through: str = "expert"
    """expert, to send tokens through their own domain's on the way to the next layer; or router."""
    router_ridge: float = 0.001
    regmean_ridge: float = 0.01
    averaged: int = 0
    """For `combine`: of how many sources the means are from which it sets out."""
    rows: tuple[int, ...] | None = None
    """The experts whose router rows are fitted on text, while the others' stay; all by default."""
