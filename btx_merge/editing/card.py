"""The model card of an edited model: what stands in it of the old set is corrected, and what was done is added."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from btx_merge.architectures.btx import active_parameters, experts_per_token
from btx_merge.editing.plan import EditPlan
from btx_merge.merging.card import combined_over, expert_numbers, languages, planned_sizes, published, source_row
from btx_merge.merging.recipe_file import source_references
from btx_merge.model.card import LICENCE_KEYS, UNTRAINED, sizes, with_metadata
from btx_merge.sources.cards import front_matter
from btx_merge.sources.source import SEED, Source

_COMBINED = re.compile(r"^(- Attention, embeddings, norms and head: `\w+` over ).*\.$", re.MULTILINE)
_ROW = re.compile(r"^\| (\S+) \| (.*) \| (.*) \| ([\d, ]+|none) \|\n", re.MULTILINE)


def edited_card(text: str, edit: EditPlan, is_updated: bool) -> str:
    """Return the card with the new set's sources, sizes and metadata. What its author added stays.

    Args:
        is_updated: whether the shared weights are of the new set too.
    """
    metadata, body = front_matter(text)
    models = f"{len(edit.mixture.sources)} Llama models"
    body = re.sub(r"^(# (?:.+: )?)\d+ Llama models", rf"\g<1>{models}", body, count=1, flags=re.MULTILINE)
    body = body.replace(_old_sizes(edit), planned_sizes(edit.mixture))
    if is_updated:
        combined = combined_over(edit.values.get("combine", "mean"), edit.mixture.experts)
        body = _COMBINED.sub(lambda match: f"{match[1]}{combined}.", body, count=1)
    body = _edited_table(body, edit)
    if not metadata:
        return body
    return with_metadata(_edited_metadata(metadata, edit), body)


def edit_section(edit: EditPlan, shared: str) -> str:
    """Write what the card says at its end about the edit.

    Args:
        shared: what became of the shared weights: updated or kept.
    """
    recipe = edit.recipe
    renamed = [f"{old} is {new} now" for old, new in recipe.rename.items()]
    verbs = {"Dropped": recipe.drop, "Added": recipe.add, "Replaced": recipe.replace, "Renamed": renamed}
    done = [f"- {verb}: {', '.join(names)}." for verb, names in verbs.items() if names]
    rows = ", ".join(f"{name} ({init})" for name, init in edit.router_inits.items())
    untrained = f" {UNTRAINED}" if {"random", "zeros"} & set(edit.router_inits.values()) else ""
    lines = [*done, f"- Shared weights: {shared}."]
    if rows:
        lines.append(f"- Router rows of new experts: {rows}.{untrained}")
    text = "\n".join(lines)
    return f"## Edited\n\nBy `btx edit`; the other experts and their router rows are as before.\n\n{text}\n"


def _old_sizes(edit: EditPlan) -> str:
    """Write the model's sizes as its card has them, so that they can be found there."""
    shapes = {name: tensor.shape for name, tensor in edit.model.tensors.items()}
    experts = edit.model.num_experts
    per_token = experts_per_token(edit.model.router_type, edit.model.num_experts_per_tok, experts)
    total = sum(math.prod(shape) for shape in shapes.values())
    return sizes(total, active_parameters(shapes, experts, per_token), per_token, experts)


def _edited_table(body: str, edit: EditPlan) -> str:
    """Correct the table of sources: lines of what goes are taken out, the others get their new names and numbers."""
    mixture, now = edit.mixture, {origin: name for name, origin in edit.origins.items()}
    by_name = {source.name: source for source in mixture.sources}
    known = {SEED, *edit.model.domains}
    end = 0

    def line(match: re.Match[str]) -> str:
        """Return what becomes of one line of the table."""
        if match[1] not in known:  # a table of something else
            return match[0]
        name = now.get(match[1], match[1])
        if name in edit.new:
            return source_row(mixture, by_name[name]) + "\n"
        if name not in by_name:
            return ""
        return f"| {name} | {match[2]} | {match[3]} | {expert_numbers(mixture, by_name[name])} |\n"

    body = _ROW.sub(line, body)
    # added experts go behind the last line of a source
    for match in _ROW.finditer(body):
        end = match.end() if match[1] in by_name else end
    added = "".join(source_row(mixture, by_name[name]) + "\n" for name in edit.recipe.add)
    return body[:end] + added + body[end:] if end else body


def _edited_metadata(metadata: Mapping[str, Any], edit: EditPlan) -> dict[str, Any]:
    """Return the card's metadata with the base models and languages of the new set.

    The licence goes if a new source has another one: which licence the result may have is for its author to say.
    """
    out = dict(metadata)
    new = [source for source in edit.mixture.sources if source.name in edit.new]
    given = out.get("base_model") or []
    before = given if isinstance(given, list) else [given]
    bases = _edited_bases(before, edit, new)
    if bases != before:
        for key in ("base_model", "base_model_relation"):
            out.pop(key, None)
        if bases:
            out |= {"base_model": bases, "base_model_relation": "merge"}
    cards = [source.card_metadata() for source in new]
    if any(card.get("license") != out.get("license") for card in cards):
        for key in LICENCE_KEYS:
            out.pop(key, None)
    if known := languages([out, *cards]):
        out["language"] = known
    return out


def _edited_bases(before: Sequence[Any], edit: EditPlan, new: Sequence[Source]) -> list[Any]:
    """Return the base models of the new set, each once.

    One of those before goes only if no source that stays was made from it.

    Args:
        before: those of the card.
        new: the sources that were added.
    """
    stays = {SEED, *edit.origins.values()}
    ids = {name: reference.partition("@")[0] for name, reference in source_references(edit.values).items()}
    used = {ids[name] for name in ids if name in stays}
    bases = [base for base in before if base in used or base not in ids.values()]
    for source in new:
        bases += published(source)
    return list(dict.fromkeys(bases))
