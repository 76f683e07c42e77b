"""Checks of texts by a look at their first records, before anything heavy begins or is written."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

from btx_merge.errors import InputError, Problem
from btx_merge.files.folder import read_json
from btx_merge.sources.tokenizer_files import TEMPLATE_FILES, TEMPLATES
from btx_merge.texts.readers import read_file, suffix_of
from btx_merge.texts.references import DomainText, files_of, plain_text, reference_problems

_RECORDS = 3
"""Records of a file that are read."""
_FILES = 20
"""Files of a reference that are read; the others are only seen to be there."""
_MOST_JSON = 64_000_000
"""Bytes of a `.json` file, which can be read as a whole only, above which it is not."""


def check_texts(texts: Iterable[DomainText], tokenizer: Path | None = None) -> list[Problem]:
    """Return what is wrong with the texts: references that lead nowhere, and first records that are no documents.

    Datasets of the Hub are not read.

    Args:
        tokenizer: the folder of the tokenizer that will read them. Records with messages need its chat template; they
            are not judged where it is not known.
    """
    has_template = tokenizer is None or has_chat_template(tokenizer)
    problems = []
    for text in texts:
        for reference in text.references:
            found = reference_problems(text.name, reference)
            known = {problem.where for problem in found}
            files = [file for file in files_of(reference) if str(file) not in known]
            for file in files[:_FILES]:
                found += _record_problems(text.name, file, has_template)
            problems += found
    return problems


def shared_text_warnings(texts: Iterable[DomainText]) -> list[Problem]:
    """Return a warning for each group of domains that have files in common: no router can tell them apart by those."""
    domains_of: dict[str, list[str]] = {}
    for text in texts:
        for reference in text.references:
            for place in [os.path.realpath(file) for file in files_of(reference)] or [reference]:
                names = domains_of.setdefault(place, [])
                if text.name not in names:
                    names.append(text.name)
    places_of: dict[str, list[str]] = {}
    for place, names in domains_of.items():
        if len(names) > 1:
            places_of.setdefault(", ".join(names), []).append(place)
    expected = "a text of its own for each, from which the routers learn to tell them apart"
    return [
        Problem(
            names, first + (f" and {len(more)} more" if more else ""), "the same text for several domains", expected
        )
        for names, (first, *more) in places_of.items()
    ]


def has_chat_template(folder: Path) -> bool:
    """Return whether a tokenizer's folder holds a chat template, at one of the places where transformers looks."""
    if any((folder / name).is_file() for name in TEMPLATE_FILES) or any((folder / TEMPLATES).glob("*.jinja")):
        return True
    file = folder / "tokenizer_config.json"
    try:
        return file.is_file() and bool(read_json(file).get("chat_template"))
    except InputError:  # who opens the model says so
        return True


def _record_problems(name: str, file: Path, has_template: bool) -> list[Problem]:
    if suffix_of(file) == ".json" and file.stat().st_size > _MOST_JSON:
        return []
    try:
        for record in itertools.islice(read_file(name, file), _RECORDS):
            plain_text(record, has_template)
    except InputError as error:
        return list(error.problems)
    return []
