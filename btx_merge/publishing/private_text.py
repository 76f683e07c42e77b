"""A search for what nobody wants to publish in the text files of a model: paths of this machine, and tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from btx_merge.errors import InputError, Problem
from btx_merge.files.folder import read_bytes

_SECRET = re.compile(r"\b(?:hf_|api_org_)[A-Za-z0-9]{30,}")
# Not behind a letter, as in a URL; behind a slash it is one of `file:///home/...`.
_HOMES = re.compile(r"(?<![\w.~-])(?:/home/[\w.-]+|/Users/[\w.-]+|/root/[\w.-]+|[A-Za-z]:[\\/]+Users[\\/]+[\w.-]+)")
# A chat template or an added token may hold anything that looks like a path. In JSON each stands on its own line.
_TOKENIZER_TEXT = re.compile(r'\s*"(?:chat_template|template|content)":')
_OF_TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "added_tokens.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
)


def private_text(folder: Path, names: list[str], changed: Mapping[str, str]) -> Iterator[Problem]:
    """Find every token and path of this machine in these files, with its line.

    In a tokenizer's files and in chat templates only tokens are looked for.

    Args:
        changed: files' names to what is published in place of what they hold.
    """
    own = _own_paths(folder)
    for name in names:
        has_paths = name not in _OF_TOKENIZERS and not name.endswith(".jinja")
        text = changed.get(name)
        try:
            text = read_bytes(folder / name, folder).decode(errors="replace") if text is None else text
        except InputError as error:
            yield from (replace(problem, source="model", where=name) for problem in error.problems)
            continue
        for number, line in enumerate(text.splitlines(), 1):
            where = f"{name}, line {number}"
            for secret in _SECRET.findall(line):
                found = f"an access token ({secret[: secret.rindex('_') + 4]}...)"
                yield Problem("model", where, found, "", "Delete it, and revoke it at the Hub if others can know it.")
            if has_paths and not _TOKENIZER_TEXT.match(line):
                ours = own.findall(line)
                for path in [*ours, *(home for home in _HOMES.findall(line) if not any(home in one for one in ours))]:
                    remedy = "Write it without the path, such as by its name alone."
                    yield Problem("model", where, f"a path of this machine, {path}", "", remedy)


def _own_paths(folder: Path) -> re.Pattern[str]:
    """Match the model's folder, all above it that are not common to every machine, and the home folder."""
    places = {folder.absolute(), folder.resolve(), *folder.absolute().parents, *folder.resolve().parents, Path.home()}
    named = sorted((str(place) for place in places if len(place.parts) > 2), key=len, reverse=True)
    return re.compile("|".join(rf"(?<![\w.~-]){re.escape(place)}(?![\w-])" for place in named) or r"(?!)")
