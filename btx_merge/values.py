"""The fields of recipes: what their docstrings say, rules for their values, messages for values that break them."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import itertools
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from btx_merge.errors import InputError, Problem
from btx_merge.reporting import short

Rule = tuple[str, Callable[[Any], bool]]
"""What is expected of a value of the right kind, and whether a value is that."""

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*(?:([KMGT])i?B?|B)", re.IGNORECASE)
_NAMED = 20  # unknown keys named one by one


@functools.cache
def field_descriptions(cls: type) -> Mapping[str, str]:
    """Return the text under each field of a class, by the field's name. It is read from the source, on one line."""
    module = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
    (definition,) = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    out = {}
    for statement, below in itertools.pairwise(definition.body):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            out[statement.target.id] = " ".join(str(below.value.value).split())
    return MappingProxyType(out)  # it is kept, so nobody may change it


def is_text(value: Any) -> bool:
    """Return whether a value is text, and one that a file in UTF-8 or a path can hold."""
    try:
        return isinstance(value, str) and bool(value.encode("utf-8", "surrogateescape") or True)
    except UnicodeEncodeError:
        return False


def is_number(value: Any) -> bool:
    """Return whether a value is a number that a float can hold; NaN and infinities are."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number that 64 bits can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def path_as_text(value: Any) -> Any:
    """Return a path as text, and any other value as it is."""
    return str(value) if isinstance(value, Path) else value


_KINDS: dict[str, Rule] = {  # annotation to what a person calls it
    "str": ("text", is_text),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int": ("a whole number", is_whole),
    "float": ("a number", is_number),
}


def one_of(names: Collection[str]) -> Rule:
    """Return the rule that a value is one of these names."""
    return f"one of {', '.join(names)}", lambda value: value in tuple(names)


def choices(rule: Rule) -> list[str]:
    """Return the names that a rule of `one_of` has to choose from; none of another rule.

    >>> choices(one_of(("whole", "split")))
    ['whole', 'split']
    """
    _, is_one_of, names = rule[0].partition("one of ")
    return names.split(", ") if is_one_of else []


def at_least(least: float) -> Rule:
    """Return the rule that a number is finite and at least so large."""
    return f"at least {least}", lambda value: least <= value < math.inf


ABOVE_ZERO: Rule = ("above 0", lambda value: 0 < value < math.inf)
RANDOM_SEED: Rule = ("in [0, 2**32)", lambda value: 0 <= value < 2**32)


def parse_size(text: str) -> int | None:
    """Return the bytes of a size such as 5GB (powers of ten) or 5GiB (powers of two); None where it is none."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        return None
    base = 1024 if "i" in text.lower() else 1000
    power = " KMGT".index((match[2] or " ").upper())
    return int(float(match[1]) * base**power)


SHARD_SIZE: Rule = ("a size such as 5GB, 500MB or 5GiB", lambda value: bool(parse_size(value)))


def value_problems(recipe: Any, rules: Mapping[str, Rule]) -> list[Problem]:
    """Return what is wrong with the single values of a recipe, a dataclass: their kinds, then what the rules say.

    Fields that are neither text, a switch nor a number are passed over.
    """
    problems = []
    for item in fields(recipe):
        value, annotation = getattr(recipe, item.name), str(item.type)
        kind, is_kind = _KINDS.get(annotation.removesuffix(" | None"), ("", None))
        if is_kind is None or (value is None and annotation.endswith(" | None")):
            continue
        expected, is_fine = rules.get(item.name, (kind, lambda value: True))
        if not is_kind(value):  # of another kind; the rule would fail on it
            found = "missing" if value is None and kind == "text" else short(value)
            if isinstance(value, int) and not isinstance(value, bool) and kind in ("a number", "a whole number"):
                kind += " of a usual size"
            problems.append(Problem("recipe", item.name, found, expected if kind == "text" else kind, _remedy(value)))
        elif not is_fine(value):
            remedy = _size_remedy(value) if (expected, is_fine) == SHARD_SIZE else ""
            problems.append(Problem("recipe", item.name, short(value) if value != "" else "missing", expected, remedy))
    return problems


def parse_field(recipe: Any, name: str, parse: Callable[[Any, str], Any], needed: str = "") -> list[Problem]:
    """Put what `parse` makes of a value into a recipe, a frozen dataclass; return what is wrong with the value.

    Args:
        parse: takes the value and the field's name, and raises InputError.
        needed: what is expected where nothing is given; without it, nothing has to be.
    """
    try:
        value = parse(getattr(recipe, name), name)
    except InputError as error:
        return list(error.problems)
    object.__setattr__(recipe, name, value)
    return [Problem("recipe", name, "missing", needed)] if needed and not value else []


def _remedy(value: Any) -> str:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return ""
    return "In YAML a number stands without quotes, and with a point before an exponent: 1.0e-5."


def _size_remedy(value: str) -> str:
    return f"Say {value.strip()}GB or {value.strip()}MB." if value.strip().isdecimal() else ""


def size_problem(where: str, text: Any) -> Problem:
    """Return what is wrong with a size of files that `parse_size` does not take."""
    remedy = _size_remedy(text) if isinstance(text, str) else ""
    return Problem("command", where, short(text), SHARD_SIZE[0], remedy)


def mapping_problems(key: str, value: Any, expected: str) -> list[Problem]:
    """Return what is wrong with a value of a recipe that should be a mapping from text to text."""
    if isinstance(value, Mapping) and all(is_text(part) for item in value.items() for part in item):
        return []
    return [Problem("recipe", key, short(value), expected)]


def unknown_problems(source: str, keys: Iterable[Any], known: Collection[str], prefix: str = "") -> list[Problem]:
    """Return one problem for each key that is none of the known, with the nearest of them; many are counted."""
    unknown = [key if isinstance(key, str) else short(key) for key in keys if key not in known]
    problems = []
    for key in unknown[:_NAMED]:
        near = difflib.get_close_matches(key[:100].replace("-", "_"), known, 1)
        remedy = f"Did you mean {near[0]}?" if near else f"Known are: {', '.join(known)}."
        problems.append(Problem(source, prefix + key, "unknown key", "", remedy))
    if len(unknown) > _NAMED:
        problems.append(Problem(source, f"{len(unknown) - _NAMED:,} more keys", "unknown"))
    return problems
