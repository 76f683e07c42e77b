"""The texts of `reproduce.py`: the demo's three domains and German, each split by document.

German is what a translated program says: the messages of pretix, whose wheel `make reproduce` downloads and does not
install.
"""

from __future__ import annotations

import gettext
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from demo_texts import Corpus, code_files, english_files, math_files, split_documents

DOMAINS = ("english", "code", "math", "german")
EXPERTS = DOMAINS[1:]
"""English is what the seed is for."""
PARTS = ("training", "validation", "held-out")
SCORED_FILES = 12
"""Documents of a domain in each of the parts that are scored."""
TRAIN_CHARS = 1_000_000
"""Of each domain, at most."""
_MESSAGES = 40
"""Of a German document, in the order of their English originals: alike messages are neighbours."""


def write_texts(folder: Path, wheel: Path) -> None:
    """Write `{domain}-{part}.jsonl` for every domain and part: one line per document, no document in two parts."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Iterator[tuple[str, Callable[[], str]]]] = {
        "english": english_files(),
        "code": code_files(),
        "math": math_files(),
        "german": german_files(wheel),
    }
    seen: set[str] = set()
    for domain, found in files.items():
        corpus = split_documents(found, seen, 2 * SCORED_FILES, TRAIN_CHARS)
        for part, documents in zip(PARTS, _parts(corpus), strict=True):
            lines = (json.dumps({"text": text}) + "\n" for text in documents)
            text_file(folder, domain, part).write_text("".join(lines), "utf-8")


def text_file(folder: Path, domain: str, part: str) -> Path:
    """Return the file of a part of a domain's text."""
    return folder / f"{domain}-{part}.jsonl"


def german_files(wheel: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the German messages of a wheel of pretix, in documents of neighbours."""
    with zipfile.ZipFile(wheel) as archive:
        catalog = gettext.GNUTranslations(io.BytesIO(archive.read("pretix/locale/de/LC_MESSAGES/django.mo")))
    messages: dict[str, str] = {}
    for original, german in sorted(catalog._catalog.items(), key=lambda item: str(item[0])):  # type: ignore[attr-defined]
        # plurals have a tuple for a key, the catalog's header an empty one; texts with markup are left out
        if isinstance(original, str) and original and len(german) > 20 and "<" not in german:
            messages[original] = " ".join(german.split())
    texts = list(messages.values())
    for start in range(0, len(texts), _MESSAGES):
        document = "\n\n".join(texts[start : start + _MESSAGES])
        yield f"german/{start}", lambda document=document: document  # type: ignore[misc]


def _parts(corpus: Corpus) -> tuple[list[str], list[str], list[str]]:
    return corpus.train, corpus.heldout[:SCORED_FILES], corpus.heldout[SCORED_FILES:]
