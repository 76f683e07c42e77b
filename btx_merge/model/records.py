"""The recipe in a file: one that a person wrote, or the record that a merged model carries of itself."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from btx_merge.errors import InputError, Problem
from btx_merge.files.bounded_yaml import read_yaml
from btx_merge.files.folder import checked
from btx_merge.merging.mergekit_moe import from_mergekit, is_mergekit
from btx_merge.reporting import short
from btx_merge.sources.locate import locate
from btx_merge.texts.references import domain_texts_of
from btx_merge.values import is_number, is_text

RECIPE_FILE = "btx_recipe.yaml"
"""What a merge writes down of itself beside its result: a recipe with everything resolved."""
RECORDS = {"resolved": "", "fits": "fitted", "training": "trained", "edits": "edited", "shared_over": ""}
"""Keys of that file that are no recipe, and what they say was done to the model since."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def read_recipe_file(
    file: str | Path,
    on_note: Callable[[str], None] | None = None,
    is_given: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """Return the values of a recipe file, with the folders that it names relative to itself made absolute.

    A merged model's folder or Hub id stands for its own `btx_recipe.yaml`. That names folders and texts without their
    paths; they are looked for beside the model too.

    A file of mergekit-moe is translated (`mergekit_moe`).

    Args:
        on_note: called with how it was translated; or with what has become of the model since it was merged, which
            its recipe does not repeat, and with local folders that are not where the recipe is.
        is_given: whether another model is given for a source, so that it does not matter what the file says of it.

    Raises:
        InputError: the file is missing, is no YAML or no mapping, the Hub refuses, or folders of one name cannot be
            told apart.
    """
    path = Path(file)
    if _HUB_ID.fullmatch(str(file)) and not os.path.exists(file) and path.suffix not in (".yaml", ".yml"):
        path = locate("recipe", str(file), weights=False).folder / RECIPE_FILE
    path = path / RECIPE_FILE if os.path.isfile(path / RECIPE_FILE) else path
    roots = [path.parent, *([path.parent.parent] if path.name == RECIPE_FILE else [])]
    if path.name == RECIPE_FILE and os.path.lexists(path):
        checked(path)
    values = read_yaml(path, "recipe", "at least `seed:` and `experts:`")
    if is_mergekit(values):
        values = from_mergekit(values, str(file), on_note)
        roots.append(Path())  # mergekit sees folders from where it is called
    recorded = {key: values.pop(key, None) for key in RECORDS}
    since = [done for key, done in RECORDS.items() if done and recorded[key]]
    if since and on_note:
        on_note(f"{path}: the model was {' and '.join(since)} since it was merged; its recipe gives the merge alone.")

    is_record = recorded["resolved"] is not None or path.name == RECIPE_FILE
    bare = _bare_names(values) if is_record else {}
    values = anchor_sources(values, roots)
    if isinstance(recorded["resolved"], Mapping):
        digests = recorded["resolved"].get("sources") or {}
        if isinstance(digests, Mapping):
            digests = {name: digest for name, digest in digests.items() if not is_given(name)}
        values["resolved"] = {"sources": digests}
    bare = {name: folder for name, folder in bare.items() if not is_given(name)}
    if problems := list(_namesake_problems(path, bare, values)):
        raise InputError(problems)
    lost = [name for name, folder in bare.items() if not os.path.isdir(_references(values)[name])]
    if lost and on_note:
        on_note(f"{path}: it leaves out paths of local folders. Give {_flags(lost)} where they lie now.")
    if "domain_text" in values:
        texts = domain_texts_of(str(file), values["domain_text"], roots, "domain_text")
        values["domain_text"] = {text.name: text for text in texts}
    return values


def read_record(folder: Path) -> dict[str, Any]:
    """Return the recipe that a merged model carries of itself; empty where it has none.

    transformers' `save_pretrained` leaves it behind. It may be anybody's, so what is computed from it is checked.

    Raises:
        InputError: it cannot be read, or holds values of another kind than `btx merge` writes; all of them.
    """
    file = folder / RECIPE_FILE
    if not os.path.lexists(file):
        return {}
    values = read_yaml(checked(file), "model", "a recipe, as `btx merge` writes it")
    problems = _odd_values(file, "", values)
    if isinstance(over := values.get("shared_over"), dict):
        problems += _odd_values(file, "shared_over.", over)
    if problems:
        raise InputError(problems)
    return values


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _are_records(value: Any) -> bool:
    return isinstance(value, list) and all(_is_object(item) for item in value)


def _are_experts(value: Any) -> bool:
    if not _is_object(value):
        return False
    for spec in value.values():
        values = spec if isinstance(spec, dict) else {"model": spec}
        has_base = values.get("base") is None or is_text(values["base"])
        if not (is_text(values.get("model")) and has_base and is_number(values.get("weight", 1.0))):
            return False
    return True


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("seed", "combine", "expert_mode", "router_init", "tokenizer_source"), (is_text, "text")),
    **dict.fromkeys(("fold_norms", "seed_expert"), (lambda value: isinstance(value, bool), "true or false")),
    "seed_weight": (is_number, "a number"),
    "experts": (_are_experts, "`name: model`, or `model:`, `weight:` and `base:` below each name"),
    **dict.fromkeys(("domain_text", "prompts", "resolved", "shared_over"), (_is_object, "keys with values")),
    **dict.fromkeys(("fits", "training", "edits"), (_are_records, "a list of records")),
}
"""What stands in a model's own recipe, as far as something is computed from it or added to it."""


def _odd_values(file: Path, prefix: str, values: Mapping[str, Any]) -> list[Problem]:
    remedy = "Copy the file again from where the model came from, or remove it: then the sources are unknown."
    problems = []
    for key, (is_fine, expected) in _KINDS.items():
        if values.get(key) is not None and not is_fine(values[key]):
            problems.append(Problem("model", f"{file}: {prefix}{key}", short(values[key]), expected, remedy))
    return problems


def _references(values: Mapping[str, Any]) -> dict[str, str]:
    """Return how a recipe names its sources; what is no text is left to the recipe to refuse."""
    experts = values.get("experts")
    out = {"seed": values.get("seed"), **(experts if isinstance(experts, Mapping) else {})}
    plain = {name: spec.get("model") if isinstance(spec, Mapping) else spec for name, spec in out.items()}
    return {name: spec for name, spec in plain.items() if isinstance(name, str) and isinstance(spec, str)}


def _bare_names(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the sources that a record names by their folders' names alone."""
    return {name: model for name, model in _references(values).items() if os.path.basename(model) == model}


def _namesake_problems(file: Path, bare: Mapping[str, str], values: Mapping[str, Any]) -> Iterator[Problem]:
    """Return sources that were found in one folder though they may be several of one name.

    Args:
        bare: source to the name of its folder, as a record has it.
        values: with the folders where they were found, and with the digests of `resolved`.
    """
    found = _references(values)
    digests = values.get("resolved", {}).get("sources")
    together: dict[str, list[str]] = {}
    for name in bare:
        if os.path.isdir(found[name]):
            together.setdefault(found[name], []).append(name)
    for folder, names in together.items():
        known = [digests.get(name) if isinstance(digests, Mapping) else None for name in names]
        is_one_model = known[0] is not None and all(digest == known[0] for digest in known)
        if len(names) > 1 and not is_one_model:
            text = f"all found in {folder}, for the recipe leaves out paths"
            yield Problem(str(file), ", ".join(names), text, "a folder for each", f"Give {_flags(names)}.")


def _flags(names: Iterable[str]) -> str:
    """Return the flags that say where sources lie."""
    return " ".join("--seed MODEL" if name == "seed" else f"--expert {name}=MODEL" for name in names)


def anchor_sources(values: Mapping[str, Any], roots: Sequence[Path]) -> dict[str, Any]:
    """Return a recipe's values with its sources' folders made absolute, seen from the first root where one is."""

    def anchored(reference: Any) -> Any:
        if not isinstance(reference, str):
            return reference
        # os.path's functions say no to a name that no file can have, where pathlib's raise
        beside = next((root / reference for root in roots if os.path.isdir(root / reference)), None)
        if beside is not None:
            return str(beside.resolve())
        is_relative = reference.startswith(("./", "../")) or reference in (".", "..")
        return os.path.abspath(roots[0] / reference) if is_relative else reference

    out = {**values, "seed": anchored(values.get("seed"))}
    if isinstance(experts := values.get("experts"), dict):
        out["experts"] = {
            name: {key: anchored(value) if key in ("model", "base") else value for key, value in spec.items()}
            if isinstance(spec, dict)
            else anchored(spec)
            for name, spec in experts.items()
        }
    return out
