"""What speaks against an edit before any new source is opened: names, counts, kinds of merges, texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from btx_merge.editing.recipe import EditRecipe
from btx_merge.errors import InputError, Problem
from btx_merge.fitting.recipe import TEXT_ROUTERS
from btx_merge.merging.recipe import ROUTER_TYPES
from btx_merge.model.merged import MergedModel
from btx_merge.reporting import short
from btx_merge.sources.source import SEED, as_spec
from btx_merge.sources.tokenizer_files import has_tokenizer


def set_problems(recipe: EditRecipe, model: MergedModel, values: Mapping[str, Any]) -> list[Problem]:
    """Return why the model's experts cannot become those that the recipe asks for.

    Args:
        values: the model's record of its own merge.
    """
    return [*_name_problems(recipe, model), *_count_problems(recipe, model), *_kind_problems(model, values)]


def _name_problems(recipe: EditRecipe, model: MergedModel) -> Iterator[Problem]:
    """Check that what is changed exists, and that all experts have different names in the end."""
    known = f"one of {', '.join(model.domains)}"
    for flag, names in (("--drop", recipe.drop), ("--replace", recipe.replace), ("--rename", recipe.rename)):
        for name in names:
            if name not in model.domains:
                yield Problem("model", flag, f"no expert {name}", known)
    if SEED in recipe.rename:
        yield Problem("model", "--rename", "the seed", "another expert; the seed is known by its name")
    taken = [*(recipe.rename.get(name, name) for name in model.domains if name not in recipe.drop), *recipe.add]
    for name in taken:
        try:
            if name != SEED:
                as_spec(name, "a model")  # a name that the model's config gives may be any text
        except InputError as error:
            yield from (replace(problem, source="model") for problem in error.problems)
    for name in sorted({name for name in taken if taken.count(name) > 1}):
        remedy = "Choose another name; --replace puts another model in an expert's place."
        yield Problem("model", "--add" if name in recipe.add else "--rename", f"two experts {name}", "one", remedy)


def _count_problems(recipe: EditRecipe, model: MergedModel) -> Iterator[Problem]:
    """Check that as many experts are left as each token needs."""
    left = len({*model.domains} - {*recipe.drop}) + len(recipe.add)
    experts = left * model.num_chunks
    chosen = recipe.num_experts_per_tok or model.num_experts_per_tok
    if not left:
        yield Problem("model", "--drop", "all experts", "at least one that stays", "Leave one out, or --add another.")
    elif chosen > experts:
        expected = f"in [1, {experts}], for there are {experts} experts" if experts > 1 else "1, for there is 1 expert"
        yield Problem("model", "num_experts_per_tok", f"{chosen}", expected, "Give --num-experts-per-tok.")


def _kind_problems(model: MergedModel, values: Mapping[str, Any]) -> Iterator[Problem]:
    """Check that experts of this model can be told apart, and that its routing is one of ours."""
    if values.get("expert_mode") == "blend":
        remedy = "Merge anew with other sources."
        yield Problem("model", "expert_mode", "blend: every expert is a part of all sources", "whole or split", remedy)
    if (router_type := model.config.get("router_type", "top_k")) not in ROUTER_TYPES:
        expected = f"one of {', '.join(ROUTER_TYPES)}"
        yield Problem("model", "config.json: router_type", short(router_type), expected)


def text_problems(recipe: EditRecipe, model: MergedModel, origins: Mapping[str, str | None]) -> Iterator[Problem]:
    """Check that rows to be fitted have their text, and that no text is given in vain.

    Args:
        origins: every domain of the result and its name in the model; None for what is new.
    """
    texts = [text.name for text in recipe.domain_text]
    new = [name for name, origin in origins.items() if origin is None]
    for name in texts:
        if name not in origins:
            yield Problem("command", "--domain-text", f"no expert {name}", f"one of {', '.join(origins)}")
    missing = [name for name in new if name not in texts]
    if recipe.router_init in TEXT_ROUTERS and missing:
        remedy = "Give " + ", ".join(f"--domain-text {name}=FILE" for name in missing) + ", or --router-init random."
        yield Problem("command", "--domain-text", f"none for {', '.join(missing)}", "text of every new expert", remedy)
    if recipe.router_init == "logistic" and not {*texts} - {*new}:
        remedy = "Give text of an expert that stays, or --router-init ridge."
        expected = "text of others, from which a logistic row sets its own apart"
        yield Problem("command", "--domain-text", "of new experts alone", expected, remedy)
    is_fitted = recipe.router_init in (None, *TEXT_ROUTERS) and any(name in texts for name in new)
    if texts and not is_fitted:
        remedy = "Leave it out, or fit all routers anew with btx fit."
        yield Problem("command", "--domain-text", "given, but no new expert's row is fitted on it", "", remedy)
    if is_fitted and not has_tokenizer(model.located.folder):
        yield Problem("model", str(model.located.folder), "no tokenizer", "one, to fit a router's row on text")
