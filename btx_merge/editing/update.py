"""Can the shared weights of an edited model move as if merged with the new set? Then by which two merges?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from btx_merge.architectures.llama import GATE
from btx_merge.checkpoints.dtypes import TORCH_NAMES, from_float32
from btx_merge.editing.plan import EditPlan
from btx_merge.editing.record import recipe_of_new_set, shared_over
from btx_merge.editing.shared import SharedUpdate
from btx_merge.errors import InputError, Problem
from btx_merge.merging.checks import examine
from btx_merge.merging.fits import REGMEAN_METHODS
from btx_merge.merging.plan import Plan, make_plan
from btx_merge.merging.recipe import DIFFERENCE_METHODS, MergeRecipe
from btx_merge.model.merged import MergedModel
from btx_merge.model.records import RECIPE_FILE, RECORDS, anchor_sources
from btx_merge.sources.source import SEED, Source

_SAMPLE_ROWS = 8
"""Rows of the first gate_proj by which a source is known again: thousands of values, read in no time. Another
checkpoint, if only of a later step, differs in the first."""
_KEEP = "Give --source NAME=MODEL where it lies now, or --shared keep."


@dataclass(frozen=True, eq=False)
class SharedPlan:
    """What becomes of the shared weights."""

    update: SharedUpdate | None
    """None: they are kept."""
    reason: str
    """Why they are kept, or what their update goes by."""
    warnings: tuple[Problem, ...] = ()

    @property
    def outcome(self) -> str:
        """What an edit's report and record say of them."""
        return "updated" if self.update else "kept"


def plan_shared(edit: EditPlan, scratch: Callable[[], Path]) -> SharedPlan:
    """Open and check the merges of the old and of the new set; keep the shared weights where that cannot be done.

    Raises:
        InputError: an update was asked for, and the sources do not allow it.
    """
    recipe = edit.recipe
    if recipe.is_rename_only:
        return SharedPlan(None, "no expert comes or goes")
    if recipe.shared == "keep":
        return SharedPlan(None, "as asked")
    try:
        if problems := list(_kind_problems(edit)):
            raise InputError(problems)
        update = _update(edit, scratch)
    except InputError as error:
        if recipe.shared == "update":
            raise
        return SharedPlan(None, str(error.problems[0]), (_kept_warning(edit, error.problems),))
    reason, combine = "as if merged with the new set", edit.values.get("combine")
    if combine in REGMEAN_METHODS:
        reason = f"by the difference of the plain means; a fresh merge would fit them by {combine} to the new set"
    return SharedPlan(update, reason)


def _update(edit: EditPlan, scratch: Callable[[], Path]) -> SharedUpdate:
    """Return the merges of the old and of the new set.

    Raises:
        InputError: sources that are not there, or not those that the model was merged from.
    """
    sources = edit.recipe.sources
    allowed = {key: True for key in ("allow_nonfinite", "allow_unrelated") if getattr(edit.recipe, key)}
    old = {**edit.values, **shared_over(edit), **allowed}
    new = {**recipe_of_new_set(edit, public=False), **allowed}
    stays = {SEED: SEED, **{name: origin for name, origin in edit.origins.items() if origin}}
    moved = {name: sources[origin] for name, origin in stays.items() if origin in sources}
    try:
        before = _merge_of(old, edit.model, sources, scratch)
        after = _merge_of(new, edit.model, moved, scratch)
    except InputError as error:
        raise InputError(replace(problem, remedy=_KEEP) for problem in error.problems) from error
    if problems := [*_changed_problems(edit, before), *_drop_problems(edit, before, after)]:
        raise InputError(problems)
    return SharedUpdate.of(edit.mixture, before, after)


def _kept_warning(edit: EditPlan, problems: Sequence[Problem]) -> Problem:
    """Return one warning for all that keeps the shared weights from being updated."""
    known = (SEED, *(shared_over(edit).get("experts") or {}), *(edit.values.get("experts") or {}))
    names = [name for name in dict.fromkeys(known) if name in {problem.source for problem in problems}]
    if not names:
        return replace(problems[0], found=f"shared weights are kept: {problems[0].found}")
    flags = " ".join(f"--source {name}=MODEL" for name in names)
    remedy = f"Give {flags} where they lie now, or --shared keep if that is meant."
    found = f"kept, for want of {', '.join(names)}: {replace(problems[0], remedy='')}"
    return Problem("model", "shared weights", found, "", remedy)


def _merge_of(
    values: Mapping[str, Any], model: MergedModel, moved: Mapping[str, str], scratch: Callable[[], Path]
) -> Plan:
    """Open, check and lay out the merge that a recipe's values describe; the arguments are `dense_recipe`'s.

    Raises:
        InputError: every problem of every source.
    """
    recipe = dense_recipe(values, model, moved)
    examined = examine(recipe, scratch)
    return make_plan(recipe, examined.sources, examined.vocabulary)


def dense_recipe(values: Mapping[str, Any], model: MergedModel, moved: Mapping[str, str]) -> MergeRecipe:
    """Return the merge of a set of sources by a model's recipe, with nothing fitted: the mean where RegMean was.

    Args:
        values: the recipe's, with that set.
        moved: source to where it lies now, for those that are not where the recipe says.

    Raises:
        InputError: the recipe cannot be carried out as it stands.
    """
    folder = model.located.folder.resolve()
    anchored = anchor_sources(values, [folder, folder.parent])
    plain = {key: value for key, value in anchored.items() if key not in RECORDS}
    plain["seed"] = moved.get(SEED, plain.get("seed"))
    experts = {}
    for name, spec in (plain.get("experts") or {}).items():
        experts[name] = dict(spec) if isinstance(spec, dict) else {"model": spec}
        experts[name]["model"] = moved.get(name, experts[name].get("model"))
    combine = plain.get("combine", "mean")
    plain |= {"experts": experts, "combine": "mean" if combine in REGMEAN_METHODS else combine}
    if plain.pop("head", None) == "fitted":
        plain["untie"] = True  # it could mix tied and untied sources
    plain |= {"router_init": "zeros", "domain_text": {}, "prompts": {}, "num_experts_per_tok": 1}
    plain |= {"dtype": TORCH_NAMES[model.dtype], "tokenizer_source": SEED}
    return MergeRecipe.from_dict(plain, str(model.located.folder / RECIPE_FILE))


def _kind_problems(edit: EditPlan) -> Iterator[Problem]:
    """Check that the model's own recipe says of what its shared weights are a merge, and that they may move."""
    where = str(edit.model.located.folder / RECIPE_FILE)
    if not edit.values:
        remedy = "Copy it there from the model that this one was made of, or give --shared keep."
        yield Problem("model", where, "no recipe, which would name the sources", "", remedy)
    elif edit.values.get("fold_norms"):
        found = "fold_norms: its experts have absorbed the norms that an update would move"
        yield Problem("model", where, found, "", "Give --shared keep, or merge anew.")


def _changed_problems(edit: EditPlan, before: Plan) -> Iterator[Problem]:
    """Find sources that are not what the model was merged from, as far as its experts tell.

    Where sources were split or experts finetuned, nothing is told.
    """
    trained = {entry.get("train") for entry in edit.values.get("training") or []}
    if edit.mixture.chunks > 1 or trained - {"routers", "shared"}:
        return
    now = edit.values.get("experts") or {}
    then = shared_over(edit).get("experts") or {}
    for source in before.experts:
        name = source.name
        is_here = name in edit.model.domains and (name == SEED or now.get(name) == then.get(name))
        if is_here and not _is_expert(edit.model, name, source):
            found = f"{source.located.folder} is not what the expert {name} was made from: other feed-forward weights"
            yield Problem(name, GATE.format(layer=0), found, "", _KEEP)


def _is_expert(model: MergedModel, name: str, source: Source) -> bool:
    """Return whether the first rows of a source's feed-forward block are those of the model's expert."""
    stored = model.dense_tensors(name)[GATE.format(layer=0)]
    rows = min(_SAMPLE_ROWS, stored.shape[0])
    values = source.rows(GATE.format(layer=0), 0, rows)
    return stored.read_rows(0, rows).tobytes() == from_float32(values, stored.dtype).tobytes()


def _drop_problems(edit: EditPlan, before: Plan, after: Plan) -> Iterator[Problem]:
    """Refuse what cannot be repeated: DARE drops other values where the embedding has other rows."""
    is_random = before.recipe.combine in DIFFERENCE_METHODS and before.recipe.combine != "ties"
    if is_random and not before.vocabulary.size == after.vocabulary.size == edit.mixture.vocabulary.size:
        found = f"{before.recipe.combine}, which cannot be repeated where the vocabulary grows or shrinks"
        yield Problem("model", "combine", found, "", "Give --shared keep, or merge anew.")
