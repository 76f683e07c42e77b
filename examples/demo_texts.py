"""Three text domains from what Python and our dependencies install: nothing is downloaded, nothing is made up."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from typing import TypeGuard

DOMAINS = ("code", "english", "math")


@dataclass(frozen=True)
class Corpus:
    """The documents of one domain. A file's text is in one of the two lists, never in both."""

    train: list[str]
    heldout: list[str]


HELDOUT_FILES = 10
HELDOUT_CHARS = 3_000
"""Every held-out file gives at most its first characters, and no file with less than half of that is one."""
TRAIN_CHARS = 450_000
TRAIN_CHARS_PER_FILE = 20_000


def load_corpora(told: Callable[[str, int], None]) -> Iterator[tuple[str, Corpus]]:
    """Read three domains from what Python and our dependencies install: different texts from different files.

    code     the standard library's sources without docstrings and comments
    english  the paragraphs of prose in Python's manual (`pydoc_data`) and in the library's docstrings
    math     the docstrings of sympy and mpmath: formulas in LaTeX, worked examples

    Args:
        told: called for each file with the domain, and how many files of it were read before.
    """
    sources = {"code": code_files, "english": english_files, "math": math_files}
    seen: set[str] = set()
    for domain in DOMAINS:
        yield domain, split_documents(sources[domain](), seen, told=partial(told, domain))


def split_documents(
    files: Iterable[tuple[str, Callable[[], str]]],
    seen: set[str],
    heldout_files: int = HELDOUT_FILES,
    train_chars: int = TRAIN_CHARS,
    told: Callable[[int], None] = lambda number: None,
) -> Corpus:
    """Take held-out documents first, then those to train on, in an order that looks random but never changes.

    What held-out has, train loses: a block of text that was seen before is dropped.

    Args:
        files: the name of each, and what reads it.
        seen: the blocks of text that were seen in other domains; those of this one are added.
        told: called for each file with how many were read before.
    """
    corpus, chars = Corpus([], []), 0
    in_order = sorted(files, key=lambda file: hashlib.sha256(file[0].encode()).digest())
    for number, (_, read) in enumerate(in_order):
        told(number)
        if chars >= train_chars:
            break
        text = _without_seen_blocks(read(), seen)
        if len(corpus.heldout) < heldout_files and len(text) > HELDOUT_CHARS / 2:
            corpus.heldout.append(text[:HELDOUT_CHARS])
        elif len(text) > 200:
            corpus.train.append(text[:TRAIN_CHARS_PER_FILE])
            chars += len(corpus.train[-1])
    return corpus


def _without_seen_blocks(text: str, seen: set[str]) -> str:
    kept = []
    for block in re.split(r"\n\s*\n", text):
        words = " ".join(block.split())
        if len(words) >= 80:  # shorter ones repeat by nature: "Examples", "return self"
            if words in seen:
                continue
            seen.add(words)
        kept.append(block.rstrip())
    return "\n\n".join(kept).strip("\n")


def _python_files(root: Path, skip: tuple[str, ...]) -> Iterator[Path]:
    for path in root.rglob("*.py"):
        if not set(path.relative_to(root).parts) & set(skip):
            yield path


def _stdlib_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    skip = (
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "encodings",
        "pydoc_data",
    )
    for path in _python_files(root, skip):
        yield path.relative_to(root).as_posix(), path


def code_files() -> Iterator[tuple[str, Callable[[], str]]]:
    for name, path in _stdlib_files():
        yield name, lambda path=path: _code_only(path)  # type: ignore[misc]


def english_files() -> Iterator[tuple[str, Callable[[], str]]]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield f"topics/{name}", lambda text=text: _prose_only([text])  # type: ignore[misc]
    for name, path in _stdlib_files():
        yield name, lambda path=path: _prose_only(_docstrings(path))  # type: ignore[misc]


def math_files() -> Iterator[tuple[str, Callable[[], str]]]:
    for package in ("sympy", "mpmath"):
        root = Path(str(distribution(package).locate_file(package)))
        for path in _python_files(root, skip=("tests", "testing", "benchmarks", "parsing", "utilities")):
            name = f"{package}/{path.relative_to(root).as_posix()}"
            yield name, lambda path=path: "\n\n".join(_docstrings(path))  # type: ignore[misc]


def _parse(path: Path) -> tuple[str, ast.Module]:
    try:
        text = path.read_text("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files have invalid escapes
            return text, ast.parse(text)
    except (SyntaxError, ValueError):  # a file that is broken on purpose, or in another encoding
        return "", ast.Module([], [])


def _code_only(path: Path) -> str:
    text, tree = _parse(path)
    lines = text.split("\n")
    for node in ast.walk(tree):
        if _is_docstring(node):
            start, end = node.lineno - 1, node.end_lineno or node.lineno
            lines[start:end] = ["#"] * (end - start)
    return "\n".join(line.rstrip() for line in lines if not line.lstrip().startswith("#"))


def _is_docstring(node: ast.AST) -> TypeGuard[ast.Expr]:
    """Return whether a node is a string that stands alone as a statement."""
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def _docstrings(path: Path) -> list[str]:
    """Return the long strings of a file: its docstrings, and what is written to become one."""
    _, tree = _parse(path)
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [inspect.cleandoc(s) for s in strings if isinstance(s, str) and len(s) > 200 and s.count("\n") > 2]


def _prose_only(texts: list[str]) -> str:
    paragraphs = (" ".join(block.split()) for text in texts for block in re.split(r"\n\s*\n", text))
    return "\n\n".join(p for p in paragraphs if _is_prose(p))


def _is_prose(paragraph: str) -> bool:
    if len(paragraph) < 60 or not paragraph[0].isupper() or paragraph[-1] not in ".:":
        return False
    return sum(c.isalpha() or c == " " for c in paragraph) > 0.92 * len(paragraph)
