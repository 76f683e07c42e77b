"""Model cards of others: what may be taken from one, and how text from outside is quoted in ours."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from btx_merge.errors import InputError
from btx_merge.files.bounded_yaml import parse_yaml
from btx_merge.files.folder import read_text
from btx_merge.reporting import printable

# Metadata of a large card have some KB, most of them evaluation results; what is more is not read.
_MOST_CHARACTERS = 200_000
_MOST_VALUES = 10_000
# Of a text, and of a list, that goes over into our card: the longest id on the Hub has 96 characters.
_LONGEST = 300
_LONGEST_LIST = 200


def front_matter(text: str) -> tuple[dict[str, Any], str]:
    """Return a model card's metadata, empty where they cannot be read, and the text behind them."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n?", text, re.DOTALL)
    if match is None or len(match[1]) > _MOST_CHARACTERS:
        return {}, text
    try:
        metadata = parse_yaml(match[1], _MOST_VALUES)
    except yaml.YAMLError:
        return {}, text
    return (metadata, text[match.end() :]) if isinstance(metadata, dict) else ({}, text)


def card_texts(folder: Path) -> dict[str, str | list[str]]:
    """Return what the card in a folder says in strings and lists of strings of a usual length; nothing else of it.

    A card that is missing or cannot be read says nothing: no merge should fail for it.
    """
    try:
        metadata = front_matter(read_text(folder / "README.md"))[0]
    except InputError:
        return {}
    return _texts(metadata)


def _texts(metadata: Mapping[Any, Any]) -> dict[str, str | list[str]]:
    texts: dict[str, str | list[str]] = {}
    for key, value in metadata.items():
        if not isinstance(key, str):
            continue
        if _is_usual(value):
            texts[key] = value
        elif isinstance(value, list):
            texts[key] = [item for item in value[:_LONGEST_LIST] if _is_usual(item)]
    return texts


def _is_usual(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST and value.isprintable()


def in_card(text: str) -> str:
    """Return a name as Markdown that shows it and means nothing else, in a heading, a table or a sentence."""
    text = printable(text, _LONGEST)
    return "".join(letter if letter.isalnum() or letter in " -_.,/@" else f"&#{ord(letter)};" for letter in text)


def code_in_card(text: str) -> str:
    """Return a name as code in Markdown."""
    if re.fullmatch(r"[\w.,/@+=: ()-]+", text) and text.isprintable() and len(text) <= _LONGEST:
        return f"`{text}`"
    return f"<code>{in_card(text)}</code>"


def hub_link(repo_id: str, revision: str | None = None) -> str:
    """Return a link to a model on the Hub in Markdown, with its revision behind it where that is given."""
    return f"[{repo_id}](https://huggingface.co/{repo_id})" + (f" at revision {revision}" if revision else "")


def is_web_link(link: str) -> bool:
    """Return whether a link leads to the web, and is no script or other scheme."""
    return re.fullmatch(r"https?://[^\s<>\"']+", link) is not None and html.escape(link).isprintable()
