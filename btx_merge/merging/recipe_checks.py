"""What does not go together in a recipe whose values are right one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from btx_merge.errors import Problem
from btx_merge.reporting import short

if TYPE_CHECKING:
    from btx_merge.merging.recipe import MergeRecipe


SEED = "seed"
"""The name of the seed among the sources."""


def together_problems(recipe: MergeRecipe) -> list[Problem]:
    """Return what does not go together, of values that are right one by one."""
    problems = []

    def problem(key: str, found: str, expected: str, remedy: str = "") -> None:
        problems.append(Problem("recipe", key, found, expected, remedy))

    sources = len(recipe.experts) + recipe.seed_expert
    experts = sources * recipe.num_chunks if recipe.expert_mode == "split" else sources
    if not recipe.experts and recipe.num_experts_per_tok > experts:
        problem("experts", "none", "at least one", "Give --expert NAME=MODEL.")
    elif recipe.num_experts_per_tok > experts:
        expected = f"in [1, {experts}], for there are {experts} experts" if experts > 1 else "1, for there is 1 expert"
        problem("num_experts_per_tok", f"{recipe.num_experts_per_tok}", expected, "Give --num-experts-per-tok.")
    names = (SEED, *recipe.experts)
    if recipe.tokenizer_source not in names:
        problem("tokenizer_source", short(recipe.tokenizer_source), f"one of {', '.join(names)}")
    weights = [spec.weight for spec in recipe.experts.values()] + [recipe.seed_weight] * recipe.seed_expert
    if sources and not sum(weights) > 0:
        problem("weight", "all are 0", "at least one above 0")
    elif (recipe.combine in ("mean", "seed") or recipe.fits_shared) and set(weights) - {1.0}:
        remedy = "Say combine: weighted (or ties, dare_ties, dare_linear), or leave the weights out."
        problem("weight", f"weights, which combine: {recipe.combine} ignores", "", remedy)
    return problems + _fit_problems(recipe)


def _fit_problems(recipe: MergeRecipe) -> list[Problem]:
    """Whether what is fitted has its text, and no text is given in vain."""
    problems = []
    needs_text = recipe.fits_shared or recipe.router_init == "ridge"
    needs_prompts = recipe.router_init == "prompts"
    known = dict.fromkeys((*((SEED,) if recipe.seed_expert else ()), *recipe.experts))
    for key, flag, given, needed in (
        ("domain_text", "--domain-text {}=FILE", recipe.domain_text, needs_text),
        ("prompts", "--prompt {}=TEXT", recipe.prompts, needs_prompts),
    ):
        problems += [
            Problem("recipe", f"{key}.{name}", f"no expert {name}", f"one of {', '.join(known)}")
            for name in given
            if name not in known
        ]
        missing = [name for name in recipe.experts if name not in given]
        if needed and missing:
            remedy = "Give " + ", ".join(flag.format(name) for name in missing) + "."
            expected = "for every expert but the seed, which may go without"
            problems.append(Problem("recipe", key, f"none for {', '.join(missing)}", expected, remedy))
        elif given and not needed:
            remedy = "Say router_init: ridge or combine: regmean_merged, or leave it out."
            remedy = "Say router_init: prompts, or leave them out." if key == "prompts" else remedy
            problems.append(Problem("recipe", key, "given, but nothing is fitted on it", "", remedy))
    if recipe.is_fitted and recipe.expert_mode == "blend":
        remedy = "Choose whole or split, or fit nothing."
        problems.append(Problem("recipe", "expert_mode", "blend", "experts that belong to a domain", remedy))
    return problems
