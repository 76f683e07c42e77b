"""The base model of an adapter: the one that the recipe gives, that its config records, or the seed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from btx_merge.errors import InputError, Problem
from btx_merge.sources.locate import Located, cached_repository, is_folder, locate
from btx_merge.sources.source import Source, open_checkpoint

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_WHERE = "adapter_config.json"
_GIVE_BASE = "Name its base: --base NAME=MODEL (`base:` in the recipe)."


def adapter_base(
    name: str, config: Mapping[str, Any], given: str | None, seed: Source | None
) -> tuple[Source, tuple[Problem, ...]]:
    """Return the model under an adapter, and a warning where it is taken on the strength of its name.

    In this order: the recipe's `base`; the recorded folder, if it is there; the recorded repository at the recorded
    revision; the seed, if what is recorded has its last name, as a mirror of the same model has. A seed that is an
    adapter itself is no base of others.

    Raises:
        InputError: none of them can be had, or it is no checkpoint.
    """
    recorded, revision = _recorded(name, config)
    if given is not None:
        return _open(name, given), ()
    seed = seed if seed is not None and seed.base is None else None
    if not recorded:
        if seed is None:
            raise InputError([Problem(name, _WHERE, "names no base", "", _GIVE_BASE)])
        return seed, (_taken(name, "names no base", seed),)
    if is_folder(recorded):
        if seed is not None and _are_one(locate(name, recorded), seed.located):
            return seed, ()
        return _open_recorded(name, recorded), ()
    repository, commit = cached_repository(recorded) or (recorded, None)
    is_id = bool(_HUB_ID.fullmatch(repository))
    reference = repository if is_id else recorded
    revision = commit or revision
    if seed is not None and is_id and repository == seed.located.repo_id:
        return _at_revision(name, repository, revision, seed), ()
    if seed is not None and _last(repository) == _last(seed.located.public_name):
        found = f"the adapter's base is {recorded}" + (f", revision {revision}" if revision else "")
        return seed, (_taken(name, found, seed),)
    return _open_recorded(name, f"{reference}@{revision}" if is_id and revision else reference), ()


def _recorded(name: str, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    recorded, revision = config.get("base_model_name_or_path"), config.get("revision")
    for key, value in (("base_model_name_or_path", recorded), ("revision", revision)):
        if not isinstance(value, str | None):
            expected = "a folder or a Hub id" if key != "revision" else "a branch, a tag or a commit"
            remedy = f"Correct it, or leave it out. {_GIVE_BASE}"
            raise InputError([Problem(name, _WHERE, f"{key} is {value!r}", expected, remedy)])
    return recorded, revision


def _taken(name: str, found: str, seed: Source) -> Problem:
    remedy = f"If it was trained on another model: {_GIVE_BASE[0].lower()}{_GIVE_BASE[1:]}"
    return Problem(name, _WHERE, f"{found}; the seed, {seed.located.public_name}, is used as its base", "", remedy)


def _are_one(one: Located, other: Located) -> bool:
    if one.repo_id and (one.repo_id, one.revision) == (other.repo_id, other.revision):
        return True
    return one.folder.resolve() == other.folder.resolve()


def _last(reference: str) -> str:
    """Return the last part of a path of any system, or of a Hub id; Hub ids know no capitals."""
    return re.split(r"[\\/]", reference.rstrip("\\/"))[-1].casefold()


def _at_revision(name: str, repository: str, revision: str | None, seed: Source) -> Source:
    """Return the seed where it is of the revision that an adapter on its repository records; else that revision."""
    if revision is None or revision == seed.located.revision:
        return seed
    try:
        located = locate(name, f"{repository}@{revision}", weights=False)
    except InputError as error:
        found = f"the adapter's base is {repository} at revision {revision}, which cannot be compared with the seed's"
        remedy = f"The seed is at {seed.located.revision}. {_GIVE_BASE}"
        raise InputError([Problem(name, _WHERE, found, "", remedy), *error.problems]) from error
    if located.revision == seed.located.revision:
        return seed
    return _open_recorded(name, f"{repository}@{located.revision}")


def _open_recorded(name: str, reference: str) -> Source:
    try:
        return _open(name, reference)
    except InputError as error:
        found = f"the adapter's base {reference} is not the seed, and cannot be used"
        remedy = f"If it was trained on the seed, or another model is meant: {_GIVE_BASE[0].lower()}{_GIVE_BASE[1:]}"
        raise InputError([Problem(name, _WHERE, found, "", remedy), *error.problems]) from error


def _open(name: str, reference: str) -> Source:
    located = locate(name, reference)
    if (located.folder / _WHERE).exists():
        remedy = "Merge that one into its base first (peft's merge_and_unload, save_pretrained), and name the result."
        raise InputError(
            [Problem(name, reference, "the adapter's base is itself an adapter", "a whole model", remedy)]
        )
    return open_checkpoint(name, located, 1.0)
