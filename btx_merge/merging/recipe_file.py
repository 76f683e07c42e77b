"""A recipe from a YAML file, a merged model's record or a file of mergekit-moe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from btx_merge.errors import InputError, Problem
from btx_merge.files.bounded_yaml import read_yaml
from btx_merge.files.folder import checked
from btx_merge.merging.mergekit_moe import from_mergekit, is_mergekit
from btx_merge.model.records import HUB_ID, RECIPE_FILE, RECORDS, anchor_sources
from btx_merge.reporting import Reporter, short
from btx_merge.sources.locate import locate
from btx_merge.sources.source import SEED
from btx_merge.texts.references import domain_texts_of
from btx_merge.values import is_text


def read_recipe_file(
    file: str | Path,
    reporter: Reporter = Reporter(),
    is_given: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """Return the values of a recipe file, with the folders that it names relative to itself made absolute.

    A merged model's folder or Hub id stands for its own `btx_recipe.yaml`. That names folders and texts without their
    paths; they are looked for beside the model too.

    A file of mergekit-moe is translated (`mergekit_moe`).

    Args:
        reporter: is told how it was translated; or what has become of the model since it was merged, which its
            recipe does not repeat, and which local folders are not where the recipe is.
        is_given: whether another model is given for a source, so that it does not matter what the file says of it.

    Raises:
        InputError: the file is missing, is no YAML or no mapping, the Hub refuses, or folders of one name cannot be
            told apart.
    """
    path = Path(file)
    if HUB_ID.fullmatch(str(file)) and not os.path.exists(file) and path.suffix not in (".yaml", ".yml"):
        path = locate("recipe", str(file), weights=False).folder / RECIPE_FILE
    path = path / RECIPE_FILE if os.path.isfile(path / RECIPE_FILE) else path
    roots = [path.parent, *([path.parent.parent] if path.name == RECIPE_FILE else [])]
    if path.name == RECIPE_FILE and os.path.lexists(path):
        checked(path)
    values = read_yaml(path, "recipe", "at least `seed:` and `experts:`")
    if is_mergekit(values):
        values = from_mergekit(values, str(file), reporter)
        roots.append(Path())  # mergekit sees folders from where it is called
    recorded = {key: values.pop(key, None) for key in RECORDS}
    since = [done for key, done in RECORDS.items() if done and recorded[key]]
    if since:
        reporter.note(
            f"{path}: the model was {' and '.join(since)} since it was merged; its recipe gives the merge alone."
        )

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
    lost = [name for name, folder in bare.items() if not os.path.isdir(source_references(values)[name])]
    if lost:
        reporter.note(f"{path}: it leaves out paths of local folders. Give {_flags(lost)} where they lie now.")
    if "domain_text" in values:
        texts = domain_texts_of(str(file), values["domain_text"], roots, "domain_text")
        values["domain_text"] = {text.name: text for text in texts}
    return values


def source_references(values: Mapping[str, Any]) -> dict[str, str]:
    """Return how a recipe names its sources; what is no text is left to the recipe to refuse."""
    experts = values.get("experts")
    specs = {SEED: values.get("seed"), **(experts if isinstance(experts, Mapping) else {})}
    references = {}
    for name, spec in specs.items():
        model = spec.get("model") if isinstance(spec, Mapping) else spec
        if isinstance(name, str) and isinstance(model, str):
            references[name] = model
    return references


def _bare_names(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the sources that a record names by their folders' names alone."""
    return {name: model for name, model in source_references(values).items() if os.path.basename(model) == model}


def _namesake_problems(file: Path, bare: Mapping[str, str], values: Mapping[str, Any]) -> Iterator[Problem]:
    """Return sources that were found in one folder though they may be several of one name.

    Args:
        bare: source to the name of its folder, as a record has it.
        values: with the folders where they were found, and with the digests of `resolved`.
    """
    found = source_references(values)
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


def as_resolved(values: Any, key: str) -> dict[str, dict[str, str]]:
    """Return the digests of the sources; what else a merge wrote down there is for people."""
    sources = values.get("sources", {}) if isinstance(values, Mapping) else values
    if not isinstance(sources, Mapping) or not all(is_text(part) for item in sources.items() for part in item):
        remedy = "Leave `resolved` out: then the sources are not compared."
        expected = "name to digest, as `btx merge` writes it"
        raise InputError([Problem("recipe", f"{key}.sources", short(sources), expected, remedy)])
    return {"sources": dict(sources)}
