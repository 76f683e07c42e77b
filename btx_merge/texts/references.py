"""Texts by domain: what the user names, whether it can be read, and its documents.

Neither torch nor transformers is imported here; a tokenizer is whatever transformers gives.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btx_merge.errors import InputError, Problem
from btx_merge.reporting import short
from btx_merge.texts.readers import EXTRA, READERS, Record, is_installed, read_file, read_hub, suffix_of
from btx_merge.values import is_number, is_text, path_as_text

ONE_DOMAIN = "at least one domain, --data NAME=TEXT"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_HUB_DATASET = re.compile(r"[\w-][\w.-]*/[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


@dataclass(frozen=True)
class DomainText:
    """The texts of one domain."""

    name: str
    """Of the domain: in a fit the expert whose text it is."""
    references: tuple[str, ...]
    """Files, folders, globs, or datasets of the Hub: `org/name`, `org/name/config`, each with `@revision` or not."""
    weight: float = 1.0
    """Its share of the tokens, relative to the other domains'. Above 0."""

    def __post_init__(self) -> None:
        """Take one reference as it is, and paths."""
        given: Any = self.references
        listed = [given] if isinstance(given, (str, Path)) else given
        if isinstance(listed, (list, tuple)):
            object.__setattr__(self, "references", tuple(path_as_text(item) for item in listed))


def parse_domain_texts(flag: str, items: Iterable[str]) -> tuple[DomainText, ...]:
    """Parse the values of a flag into domains: `NAME=REFERENCE[:WEIGHT]`, again for every reference.

    One name collects its references. A weight may stand at any of them, and counts for the domain.

    Raises:
        InputError: items that cannot be meant, all of them.
    """
    problems: list[Problem] = []
    references: dict[str, list[str]] = {}
    weights: dict[str, float] = {}
    for item in items:
        name, separator, given = item.partition("=")
        reference, weight = _split_weight(given)
        if not (separator and _NAME.fullmatch(name) and reference):
            expected = "NAME=REFERENCE[:WEIGHT], such as code=code.jsonl or math=math/*.parquet:0.4"
            problems.append(Problem("command", flag, item, expected))
            continue
        if reference in references.setdefault(name, []):
            problems.append(Problem("command", flag, f"{item}: {reference} is given twice", "each text once"))
        references[name].append(reference)
        if weight is not None and not _is_weight(weight):
            problems.append(Problem("command", flag, f"{item}: the weight {weight:g}", "a number above 0"))
        elif weight is not None and weights.setdefault(name, weight) != weight:
            found = f"{name} has the weights {weights[name]:g} and {weight:g}"
            problems.append(Problem("command", flag, found, "one weight for each domain"))
    if problems:
        raise InputError(problems)
    return tuple(DomainText(name, tuple(given), weights.get(name, 1.0)) for name, given in references.items())


def domain_texts_of(origin: str, values: Any, folders: Sequence[Path], key: str = "data") -> tuple[DomainText, ...]:
    """Read domains from a mapping of a YAML file: `name: reference`, a list of them, or `text:` and `weight:`.

    Args:
        origin: the file, as errors name it.
        folders: what relative paths are relative to: the first of them where there is something. With none, they
            stay as they are.
        key: the mapping's name in the file.

    Raises:
        InputError: values that cannot be meant, all of them.
    """
    expected = "a reference, a list of references, or `text:` and `weight:`"
    if not isinstance(values, Mapping):
        raise InputError([Problem(origin, key, short(values), "`name: reference`, one line for each domain")])
    problems: list[Problem] = []
    texts = []
    for name, value in values.items():
        where = f"{key}.{name if isinstance(name, str) else short(name)}"
        value = plain_values(value) if isinstance(value, DomainText) else value
        given = value if isinstance(value, Mapping) else {"text": value}
        text = given.get("text")
        listed = [path_as_text(item) for item in (text if isinstance(text, (list, tuple)) else [text])]
        weight = given.get("weight", 1.0)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            problems.append(Problem(origin, key, f"the name {short(name)}", "letters, digits, `_`, `-`, `.`"))
        if set(given) - {"text", "weight"} or not listed or not all(is_text(x) and x for x in listed):
            problems.append(Problem(origin, where, short(value), expected))
        elif not _is_weight(weight):
            problems.append(Problem(origin, f"{where}.weight", short(weight), "a number above 0"))
        else:
            references = tuple(_relative_to(folders, reference) for reference in listed)
            texts.append(DomainText(str(name), references, float(weight)))
    if problems:
        raise InputError(problems)
    return tuple(texts)


def as_domain_texts(values: Any, key: str) -> tuple[DomainText, ...]:
    """Return the texts that a recipe in Python names: `DomainText`s, or a mapping as in a YAML file.

    In a mapping a `DomainText` may stand too; it gets the name that it stands under.

    Args:
        key: the recipe's field, as errors name it.

    Raises:
        InputError: values that cannot be meant, all of them, or a name that comes twice.
    """
    if isinstance(values, DomainText):
        values = (values,)
    if isinstance(values, (list, tuple)) and all(isinstance(text, DomainText) for text in values):
        names = [text.name for text in values]
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        remedy = "Give one DomainText with all references."
        if twice:
            raise InputError([Problem("recipe", key, f"{name} comes twice", "", remedy) for name in twice])
        values = dict(zip(names, values, strict=True))
    if not isinstance(values, Mapping):
        raise InputError([Problem("recipe", key, short(values), "`name: reference`, or DomainTexts")])
    return domain_texts_of("recipe", values, [], key)


def plain_values(text: DomainText) -> dict[str, Any]:
    """Return a domain's texts as they stand under its name in a YAML file."""
    return {"text": list(text.references), "weight": text.weight}


def as_prompts(values: Any, key: str) -> dict[str, tuple[str, ...]]:
    """Return prompts by expert, each a line or several.

    Raises:
        InputError: something else; all of it in one error.
    """
    if not isinstance(values, Mapping):
        raise InputError([Problem("recipe", key, short(values), "`name: [line, line]`, one entry per expert")])
    problems, prompts = [], {}
    for name, given in values.items():
        lines = (given,) if isinstance(given, str) else given
        is_list = isinstance(lines, (list, tuple)) and len(lines) > 0
        if is_text(name) and is_list and all(is_text(line) and line.strip() for line in lines):
            prompts[name] = tuple(lines)
        else:
            where = f"{key}.{name if isinstance(name, str) else short(name)}"
            problems.append(Problem("recipe", where, short(given), "lines of text"))
    if problems:
        raise InputError(problems)
    return prompts


def documents(text: DomainText, tokenizer: Any = None) -> Iterator[str]:
    """Stream a domain's documents, in the order of its references; of a folder or a glob, in the files' order.

    A record's document is its field `text` or `content`, or its `messages` by the tokenizer's chat template. A file of
    plain text is one document; one that is larger than a few MB is cut between paragraphs. Empty ones are left out.

    Raises:
        InputError: a file, a line or a record that cannot be read; what came before it has been given out.
    """
    for reference in text.references:
        files = files_of(reference)
        problems = [] if files else reference_problems(text.name, reference)
        if problems:
            raise InputError(problems)
        for record in _records_of(text.name, reference, files):
            document = _document_of(record, tokenizer)
            if document.strip():
                yield document


def _records_of(name: str, reference: str, files: Sequence[Path]) -> Iterator[Record]:
    if not files:
        yield from read_hub(name, reference)
    for file in files:
        yield from read_file(name, file)


def files_of(reference: str) -> list[Path]:
    """Return the files that a reference stands for, sorted; of a folder, those whose suffix is known. Empty for the
    Hub.
    """
    path = os.path.expanduser(reference)  # os.path's functions say no where pathlib's raise
    if os.path.isfile(path):
        return [Path(path)]
    if os.path.isdir(path):
        return sorted(file for file in Path(path).rglob("*") if file.is_file() and suffix_of(file) in READERS)
    return sorted(Path(found) for found in glob.glob(path, recursive=True) if os.path.isfile(found))


def reference_problems(name: str, reference: str) -> list[Problem]:
    """Return what is wrong with a reference, as far as it can be seen without reading a file."""
    files = files_of(reference)
    known = f"one of {', '.join(READERS)}"
    if not files:
        if error := _refusal(reference):
            return [Problem(name, reference, error.strerror or str(error), "a file that can be read")]
        if os.path.isdir(os.path.expanduser(reference)):
            return [Problem(name, reference, "a folder without a file of text in it", known)]
        if glob.has_magic(reference):
            return [Problem(name, reference, "no file matches", "", "Check the pattern.")]
        looks_like_path = reference.startswith((".", "/", "~")) or suffix_of(Path(reference)) in READERS
        if looks_like_path or not _HUB_DATASET.fullmatch(reference):
            expected = "a file, a folder, a glob, or a dataset of the Hub, `org/name`"
            return [Problem(name, reference, "no such file or folder", expected, "Check the path.")]
        return [] if is_installed("datasets") else [_not_installed(name, reference, "datasets")]
    problems = []
    for file in files:
        if suffix_of(file) not in READERS:
            remedy = "Unpack or convert it, or rename it if it is one."
            problems.append(Problem(name, str(file), f"the suffix {file.suffix or 'none'}", known, remedy))
        elif not file.stat().st_size:
            problems.append(Problem(name, str(file), "an empty file", "", "Remove it, or write it again."))
        elif suffix_of(file) == ".parquet" and not is_installed("pyarrow"):
            problems.append(_not_installed(name, str(file), "pyarrow"))
    return problems


def _refusal(reference: str) -> OSError | None:
    """Return the system's refusal to say what lies at a path, as below a folder that may not be entered."""
    try:
        os.stat(os.path.expanduser(reference))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        return error
    return None


def _not_installed(name: str, where: str, package: str) -> Problem:
    return Problem(name, where, f"{package} is needed to read this, and is not installed", "", f"{EXTRA}.")


def _document_of(record: Record, tokenizer: Any) -> str:
    plain = plain_text(record, getattr(tokenizer, "chat_template", None) is not None)
    if plain is not None:
        return plain
    try:
        document = str(tokenizer.apply_chat_template(record.values["messages"], tokenize=False))
    except Exception as error:  # whatever the template's own code raises
        reason = f"{type(error).__name__}: {str(error).strip()}"
        raise record.refused(f"messages that the chat template does not take ({reason})") from error
    return record.readable(document)


def plain_text(record: Record, has_template: bool) -> str | None:
    """Return a record's text, or None where it has messages for a chat template.

    Raises:
        InputError: the record has neither, or messages where there is no template.
    """
    values = record.values
    for field in ("text", "content"):
        if isinstance(values.get(field), str):
            return record.readable(str(values[field]))
    messages = values.get("messages")
    if isinstance(messages, list) and messages:
        if has_template:
            return None
        found = "messages, and the model's tokenizer has no chat template"
        raise record.refused(found, "", "Give the model one, or texts instead of messages.")
    fields = ", ".join(f"{key} ({type(value).__name__})" for key, value in values.items()) or "none"
    raise record.refused(f"the fields {fields}", "`text` or `content` with a string, or `messages` with a list")


def _split_weight(given: str) -> tuple[str, float | None]:
    """Split a reference from its weight; a file whose own name ends like a weight has none."""
    reference, colon, number = given.rpartition(":")
    if not colon or os.path.exists(os.path.expanduser(given)):
        return given, None
    try:
        return reference, float(number)
    except ValueError:
        return given, None


def _is_weight(value: Any) -> bool:
    return is_number(value) and 0 < value < math.inf


def _relative_to(folders: Sequence[Path], reference: str) -> str:
    """Resolve a reference against the first folder in which it leads to something."""
    paths = [str(folder / os.path.expanduser(reference)) for folder in folders]
    there = next((path for path in paths if files_of(path) or os.path.isdir(path)), None)
    return there or (paths[0] if paths and reference.startswith(("./", "../")) else reference)


def public_record(texts: Iterable[DomainText]) -> list[dict[str, Any]]:
    """Return texts as a published file may name them."""
    return [
        {"name": text.name, "references": [*map(public_reference, text.references)], "weight": text.weight}
        for text in texts
    ]


def public_reference(reference: str) -> str:
    """Return how a published file may name a text: a path of this machine by its last part alone."""
    is_path = reference.startswith((".", "/", "~")) or os.path.exists(reference)
    return os.path.basename(reference.rstrip("/")) if is_path else reference
