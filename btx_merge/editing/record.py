"""What an edited model's recipe and card say: the new set of sources, and what was done.

The recipe gives a fresh merge of the new set. `resolved` stays true: its digests are those of the sources as they were
merged, and those of the new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from btx_merge.editing.card import edit_section, edited_card
from btx_merge.editing.plan import EditPlan
from btx_merge.files.folder import read_text
from btx_merge.fitting.recipe import TEXT_ROUTERS
from btx_merge.merging.fits import REGMEAN_METHODS
from btx_merge.model.card_update import update_card
from btx_merge.model.records import RECIPE_FILE, append_record
from btx_merge.model.router_state import trainings
from btx_merge.sources.digest import source_digest
from btx_merge.sources.source import SEED, ExpertSpec, Source
from btx_merge.texts.references import public_record, public_reference

if TYPE_CHECKING:
    from btx_merge.model.held_out import LayerFit


def recipe_of_new_set(edit: EditPlan, *, public: bool) -> dict[str, Any]:
    """Return the model's recipe with the new set of sources, without records of what was done.

    Args:
        public: with references as they may be published; otherwise as they were given.
    """
    before = edit.values.get("experts") or {}
    by_name = {source.name: source for source in edit.mixture.sources}
    given = {**edit.recipe.replace, **edit.recipe.add}
    experts: dict[str, Any] = {}
    for name, origin in edit.origins.items():
        if origin is None:
            experts[name] = _public_spec(given[name], by_name[name]) if public else _given_spec(given[name])
        elif origin in before:
            experts[name] = before[origin]
    values = {key: value for key, value in edit.values.items() if key not in ("resolved", "shared_over")}
    values |= {"experts": experts, "seed_expert": SEED in edit.origins}
    values["num_experts_per_tok"] = edit.mixture.num_experts_per_tok
    for key in ("domain_text", "prompts"):
        values[key] = _of_those_that_stay(edit, values.get(key) or {})
    if values.get("router_init") in TEXT_ROUTERS or values.get("combine") in REGMEAN_METHODS:
        for text in edit.recipe.domain_text:
            if text.name in edit.new:
                references = [public_reference(reference) for reference in text.references]
                values["domain_text"][text.name] = {"text": references, "weight": text.weight}
    if values.get("tokenizer_source", SEED) not in edit.origins:
        values["tokenizer_source"] = SEED
    return values


def _of_those_that_stay(edit: EditPlan, before: dict[str, Any]) -> dict[str, Any]:
    """Return values of the model's experts by the names that those have from now on."""
    return {name: before[origin] for name, origin in edit.origins.items() if origin and origin in before}


def shared_over(edit: EditPlan) -> dict[str, Any]:
    """Return the sources whose merge the model's shared weights are, as keys of a recipe."""
    keys = ("seed", "seed_expert", "seed_weight", "experts")
    return edit.values.get("shared_over") or {key: edit.values[key] for key in keys if key in edit.values}


def _resolved(edit: EditPlan) -> dict[str, Any]:
    """Return the record of the merge with the new set's names and digests."""
    resolved = dict(edit.values.get("resolved") or {})
    before = resolved.get("sources")
    known = before if isinstance(before, dict) else {}
    digests = {SEED: known[SEED]} if SEED in known else {}
    digests |= _of_those_that_stay(edit, known)
    digests |= {source.name: source_digest(source) for source in edit.mixture.sources if source.name in edit.new}
    order = [source.name for source in edit.mixture.sources if source.name in digests]
    resolved["sources"] = {name: digests[name] for name in order}
    return resolved | {"expert_names": edit.mixture.expert_names}


def _public_spec(spec: ExpertSpec, source: Source) -> dict[str, Any]:
    """Return a new expert's values as a published recipe has them, without paths."""
    base = source.base.public_name if spec.base is not None and source.base else None
    return {"model": source.located.public_reference, "weight": spec.weight, "base": base}


def _given_spec(spec: ExpertSpec) -> dict[str, Any]:
    """Return a new expert's values with its folders made absolute: those of the model's sources are looked for
    elsewhere.
    """
    values = asdict(spec)
    return values | {
        key: str(Path(values[key]).resolve())
        for key in ("model", "base")
        if values[key] is not None and Path(values[key]).is_dir()
    }


def write_records(edit: EditPlan, outcome: str, files: Path, layers: Sequence[LayerFit]) -> None:
    """Add the edit to the recipe and to the card in `files`, and make both those of the new set.

    Args:
        outcome: what became of the shared weights: updated or kept.
        layers: how each layer's new rows came out, where they were fitted.
    """
    values: dict[str, Any] = {}
    if edit.values:
        values = recipe_of_new_set(edit, public=True) | {"resolved": _resolved(edit)}
        if edit.recipe.is_rename_only and "shared_over" in edit.values:
            values["shared_over"] = edit.values["shared_over"]
        elif outcome == "kept" and not edit.recipe.is_rename_only:
            values["shared_over"] = shared_over(edit)
    (files / RECIPE_FILE).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    if (files / "README.md").exists():
        card = read_text(files / "README.md")
        (files / "README.md").write_text(edited_card(card, edit, outcome == "updated"), encoding="utf-8")
    computes_the_same = edit.recipe.is_rename_only and edit.recipe.num_experts_per_tok is None
    results = None if computes_the_same else ()  # figures of another model
    append_record(files, "edits", _entry(edit, outcome, layers))
    update_card(files, edit_section(edit, outcome), results=results)


def _entry(edit: EditPlan, outcome: str, layers: Sequence[LayerFit]) -> dict[str, Any]:
    """Return what was done, as the recipe records it."""
    recipe = edit.recipe
    done = {"drop": list(recipe.drop), "rename": dict(recipe.rename)}
    done |= {key: list(getattr(recipe, key)) for key in ("add", "replace")}
    entry: dict[str, Any] = {key: value for key, value in done.items() if value}
    entry |= {"shared": outcome, "router_rows": dict(edit.router_inits)}
    entry["trainings_before"] = trainings(edit.values)
    if "random" in edit.router_inits.values():
        std = recipe.router_std or edit.mixture.seed.config["initializer_range"]
        entry |= {"router_std": std, "random_seed": recipe.random_seed}
    if layers:
        texts = public_record(recipe.domain_text)
        entry |= {"domain_text": texts, "domain_tokens": recipe.domain_tokens}
        if edit.row_fit == "ridge":
            entry["router_ridge"] = recipe.router_ridge
        entry |= {"layers": [asdict(layer) for layer in layers]}
    tools = ("btx-merge", "numpy", *(("torch", "transformers") if layers else ()))
    return entry | {"tools": {name: version(name) for name in tools}}
