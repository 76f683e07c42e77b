"""Checks of a model card's front matter: does it hold what the Hub and its users need of a merged model?"""

from __future__ import annotations

import re
from typing import Any

import yaml

from btx_merge.errors import Problem
from btx_merge.files.bounded_yaml import parse_yaml
from btx_merge.publishing.kinds import BTX, Kind
from btx_merge.reporting import short

_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z0-9]+)*|code|multilingual")


def card_problems(text: str, pipeline: str, kind: Kind = BTX) -> tuple[list[Problem], list[Problem]]:
    """Find what is wrong with a card, and what it lacks that nobody but its author can know.

    Args:
        text: of README.md.
        pipeline: the `pipeline_tag` that it should have.
        kind: what is published.
    """
    match = _FRONT_MATTER.match(text)
    if match is None:
        remedy = f"Let it begin with: --- / library_name: transformers / pipeline_tag: {pipeline} / tags: [btx] / ---"
        return [Problem("model", "README.md", "no metadata", "YAML between two lines of ---", remedy)], []
    try:
        metadata = parse_yaml(match[1])
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        return [Problem("model", "README.md", f"its metadata is no YAML ({reason})")], []
    if not isinstance(metadata, dict):
        return [Problem("model", "README.md", "its metadata is no mapping", "`key: value` lines")], []
    problems: list[Problem] = []
    for key, value in {"library_name": kind.library, "pipeline_tag": pipeline}.items():
        if metadata.get(key) != value:
            problems.append(_problem(metadata, key, value))
    problems += [
        _problem(metadata, "tags", f"a list with {tag}")
        for tag in kind.tags
        if tag not in _listed(metadata.get("tags"))
    ]
    warnings = _origin(metadata, problems, kind) + _licence(metadata, problems) + _languages(metadata, problems)
    return problems, warnings


def _origin(metadata: dict[str, Any], problems: list[Problem], kind: Kind) -> list[Problem]:
    """Check `base_model` and `base_model_relation`: together, or not at all."""
    models, relation = metadata.get("base_model"), metadata.get("base_model_relation")
    if models is None and relation is None:
        remedy = "If they are on the Hub, write base_model: [org/name, ...] and base_model_relation: merge."
        return [Problem("model", "README.md: base_model", "does not say which models were merged", "", remedy)]
    if not isinstance(models, list) or not models or not all(_is_hub_id(item) for item in models):
        problems.append(_problem(metadata, "base_model", "a list of Hub ids, org/name"))
    if relation not in kind.relations:
        problems.append(_problem(metadata, "base_model_relation", " or ".join(kind.relations)))
    return []


def _is_hub_id(item: Any) -> bool:
    return isinstance(item, str) and HUB_ID.fullmatch(item) is not None


def _licence(metadata: dict[str, Any], problems: list[Problem]) -> list[Problem]:
    licence = metadata.get("license")
    if licence is None:
        remedy = "Write license: with an identifier such as apache-2.0, or other with license_name and license_link."
        return [Problem("model", "README.md: license", "does not say under which licence it may be used", "", remedy)]
    if not all(isinstance(item, str) and _LICENCE.fullmatch(item) for item in _listed(licence)):
        problems.append(_problem(metadata, "license", "an identifier such as apache-2.0 or llama3.2"))
    elif licence == "other" and not metadata.get("license_name"):
        remedy = "Write license_name and license_link."
        return [Problem("model", "README.md: license", "other, without its name", "", remedy)]
    return []


def _languages(metadata: dict[str, Any], problems: list[Problem]) -> list[Problem]:
    languages = metadata.get("language")
    if languages is None:
        remedy = "Write language: [en] or what it is."
        return [Problem("model", "README.md: language", "does not say which languages it knows", "", remedy)]
    if not all(isinstance(item, str) and _LANGUAGE.fullmatch(item) for item in _listed(languages)):
        expected = 'codes of two or three letters such as en ("no" in quotes), code, or multilingual'
        problems.append(_problem(metadata, "language", expected))
    return []


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _problem(metadata: dict[str, Any], key: str, expected: str) -> Problem:
    found = short(metadata[key]) if metadata.get(key) is not None else "missing"
    return Problem("model", f"README.md: {key}", found, expected)
