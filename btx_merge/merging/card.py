"""The model card of a merge: what was merged, how, from which revisions. It shows no path of the user's machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from btx_merge.merging.fits import REGMEAN_METHODS
from btx_merge.merging.mixture import Mixture
from btx_merge.merging.plan import Plan
from btx_merge.model.card import (
    CITATION,
    LICENCE_KEYS,
    PAPER,
    ROUTERS_TITLE,
    UNTRAINED,
    how_to_use,
    hub_ids,
    link_licence,
    project_link,
    sizes,
    with_metadata,
)
from btx_merge.model.held_out import MODEL_INDEX, Fitted, fit_tables, model_index, router_results
from btx_merge.sources.cards import code_in_card, hub_link
from btx_merge.sources.source import Source


def model_card(plan: Plan, fitted: Fitted = Fitted()) -> str:
    """Return README.md of the result: metadata for the Hub, then text and a snippet that runs.

    Args:
        fitted: how what was fitted came out.
    """
    recipe, seed = plan.recipe, plan.seed
    title = f"{len(plan.sources)} Llama models merged by Branch-Train-MiX"
    metadata = card_metadata(plan)
    if fitted.layers:
        metadata[MODEL_INDEX] = model_index(title, router_results(fitted.layers, recipe.domain_text))
    rows = "\n".join(source_row(plan, source) for source in plan.sources)
    chunked = {
        "whole": "One expert per source, its feed-forward blocks unchanged.",
        "split": f"Each source's feed-forward blocks are split into {plan.chunks} experts.",
        "blend": "Each expert is blended from a part of every source's feed-forward blocks.",
    }[recipe.expert_mode]
    deviation = recipe.router_std or seed.config["initializer_range"]
    on_text = f"layer by layer, on up to {recipe.domain_tokens:,} tokens per domain."
    router = {
        "random": f"random, normal with standard deviation {deviation}. {UNTRAINED}",
        "zeros": f"zeros: every expert is equally likely. {UNTRAINED}",
        "ridge": f"fitted by ridge regression, {on_text}",
        "logistic": f"fitted by logistic regression, {on_text}",
        "prompts": "the mean inputs of a few prompts per expert.",
    }[recipe.router_init]
    head = "\n- Head: of its own, each row fitted by how often each domain has its token."
    head = head if recipe.has_own_head else ""
    over = combined_over(recipe.combine, plan.experts)
    folded = " Each expert absorbed its own norm (`fold_norms`)." if recipe.fold_norms else ""
    figures = f"{ROUTERS_TITLE}\n\n{fit_tables(fitted)}\n" if fitted.layers or fitted.losses else ""
    body = f"""
# {title}

A Mixture of Experts of {planned_sizes(plan)}, made by
[Branch-Train-MiX]({PAPER}) with {project_link()}.

| source | model | revision | expert |
|---|---|---|---|
{rows}

- Experts: {chunked}{folded}
- Attention, embeddings, norms and head: `{recipe.combine}` over {over}.{head}
- Routers: `{recipe.router_type}`; {router}
- The whole recipe, with all defaults and seeds: `btx_recipe.yaml`.

{how_to_use(", trust_remote_code=True")}
transformers 5 is needed. With btx-merge installed, `import btx_merge` replaces `trust_remote_code=True`.

{figures}{CITATION}"""
    return with_metadata(metadata, body)


def planned_sizes(mixture: Mixture) -> str:
    """Write the sizes of a planned model."""
    return sizes(mixture.parameters, mixture.active_parameters, mixture.experts_per_token, mixture.num_experts)


def card_metadata(plan: Plan) -> dict[str, Any]:
    """Return the YAML block that the Hub reads. `base_model` names published models, never a folder."""
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["btx", "branch-train-mix", "mixture-of-experts", "merge"],
    }
    bases = [repo_id for source in plan.sources for repo_id in published(source)]
    if bases:
        metadata["base_model"] = list(dict.fromkeys(bases))
        metadata["base_model_relation"] = "merge"
    cards = [source.card_metadata() for source in plan.sources]
    licences = [{key: card[key] for key in LICENCE_KEYS if key in card} for card in cards]
    if licences[0].get("license") and all(licence == licences[0] for licence in licences):
        metadata |= licences[0]
        link_licence(metadata, plan.seed.located)
    if known := languages(cards):
        metadata["language"] = known
    return metadata


def languages(cards: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return all languages that cards name, each once."""
    given = [card.get("language") or [] for card in cards]
    lists = [value if isinstance(value, list) else [value] for value in given]
    return list(dict.fromkeys(code for values in lists for code in values if isinstance(code, str)))


def published(source: Source) -> list[str]:
    """Return the source's id on the Hub; of a local folder, the models that its own card says it came from."""
    if source.located.repo_id:
        return [source.located.repo_id]
    return hub_ids(source.card_metadata().get("base_model"))


def source_row(mixture: Mixture, source: Source) -> str:
    """Write a source's line in the card's table."""
    located = source.located
    model = hub_link(located.repo_id) if located.repo_id else f"{code_in_card(located.public_name)} (a local folder)"
    if source.base:
        model += f", an adapter on {code_in_card(source.base.public_name)}"
    return f"| {source.name} | {model} | {located.revision or ''} | {expert_numbers(mixture, source)} |"


def expert_numbers(mixture: Mixture, source: Source) -> str:
    """Write the numbers of the experts that a source became, as the card's table names them."""
    if source not in mixture.experts:
        return "none"
    if mixture.expert_mode == "blend":
        return "in every one"
    first = mixture.experts.index(source) * mixture.chunks
    return ", ".join(map(str, range(first, first + mixture.chunks)))


def combined_over(combine: str, experts: Sequence[Source]) -> str:
    """Tell whose shared weights were combined."""
    if combine == "seed":
        return "the seed alone"
    if combine in ("mean", "dare_linear", "ties", "dare_ties", *REGMEAN_METHODS):
        return ", ".join(f"`{source.name}`" for source in experts)
    return ", ".join(f"`{source.name}` ({source.weight:g})" for source in experts)
