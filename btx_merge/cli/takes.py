"""The options of a recipe, made from its fields; and what was given of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, TypeVar

from btx_merge.cli.options import described, flag_of, option
from btx_merge.errors import InputError, Problem, collecting
from btx_merge.sources.source import ExpertSpec
from btx_merge.texts.references import parse_domain_texts
from btx_merge.values import Rule, choices

Recipe = TypeVar("Recipe")
Parser = Callable[[str, list[str]], Any]


def takes(
    recipe: type,
    rules: Mapping[str, Rule],
    *,
    without: Collection[str] = (),
    more: Mapping[str, Any] | None = None,
    **metavars: str,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of a recipe as options, in the place of its parameter `given`, which gets the `Given`.

    A field `domain_tokens: int = 200_000` becomes `--domain-tokens`. Its help is the text under the field, with the
    default; a shell completes the names of a rule that is `one_of`. A field of several values gets its flag again for
    each, as `_SEVERAL` says: `prompts` is `--prompt NAME=LINE`. `--weight` and `--base` follow fields of experts, and
    give pairs too. A field that the command has as a parameter of its own, such as the model, is left to it.

        @takes(FitRecipe, RULES)
        def fit_command(model: Model, output: Output, given: Given, quiet: Quiet = False) -> None:
            recipe = given.build(FitRecipe, model)

    Args:
        rules: those of the recipe's values.
        without: fields that get no flag.
        more: further options by name, as annotations; their values are given as they are.
        metavars: the form of a field's values, where it is not that of its type.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        flags = {
            name: flag for name, flag in _flags_of(recipe, rules, metavars).items() if name not in {*without, *own}
        }
        annotations = {name: flag.annotation for name, flag in flags.items()} | dict(more or {})

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {name: values.pop(name) for name in annotations}
            command(given=_given(flags, given), **values)

        parameters: list[inspect.Parameter] = []
        for parameter in own.values():
            is_place = parameter.name == "given"
            for name, annotation in (annotations if is_place else {parameter.name: parameter.annotation}).items():
                default = None if is_place else parameter.default
                kind = inspect.Parameter.KEYWORD_ONLY
                parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


@dataclass(frozen=True)
class Given:
    """What was given of a recipe's fields by flags."""

    values: dict[str, Any]
    flags: dict[str, str]
    """Field to the flag that it was given by."""

    def build(self, recipe: Callable[..., Recipe], *model: str) -> Recipe:
        """Return the recipe.

        Raises:
            InputError: values that cannot be meant, all of them, under the names that the user typed.
        """
        try:
            return recipe(*model, **self.values)
        except InputError as error:
            raise InputError([self.as_typed(problem) for problem in error.problems]) from None

    def as_typed(self, problem: Problem) -> Problem:
        """Return a problem of a recipe's field as one of the flag that gave it."""
        flag = self.flags.get(problem.where)
        return replace(problem, source="command", where=flag) if flag else problem


def add_to_experts(fields: Mapping[str, dict[str, dict[str, Any]]], given: Given, what: str) -> list[Problem]:
    """Move what `--weight` and `--base` gave to the experts that they name; return what does not fit.

    Args:
        fields: of the recipe, those that hold experts.
        what: what an expert is called where it is missing.
    """
    problems = []
    known = dict.fromkeys(str(name) for experts in fields.values() for name in experts)
    for key in ("weight", "base"):
        for name, value in given.values.pop(key, {}).items():
            if name not in known:
                expected = f"one of {', '.join(known) or f'the {what}s, of which there are none'}"
                problems.append(Problem("command", f"--{key}", f"no {what} {name}", expected))
            for field, experts in fields.items():
                if name in experts:
                    given.flags[f"{field}.{name}.{key}"] = f"--{key} {name}"
                    experts[name][key] = value
    return problems


def pairs(flag: str, items: list[str]) -> dict[str, str]:
    """Parse items of the form `NAME=VALUE`, each name once.

    Raises:
        InputError: an item that is none, or a name that came before.
    """
    out: dict[str, str] = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not (name and separator and value):
            raise InputError([Problem("command", flag, item, "NAME=VALUE, such as code=./llama-code")])
        if name in out:
            raise InputError([Problem("command", flag, f"{name} is given twice", "each name once")])
        out[name] = value
    return out


def lists(flag: str, items: list[str]) -> dict[str, list[str]]:
    """Parse items of the form `NAME=VALUE`, each name as often as one likes.

    Raises:
        InputError: an item that is none.
    """
    out: dict[str, list[str]] = {}
    for item in items:
        for name, value in pairs(flag, [item]).items():
            out.setdefault(name, []).append(value)
    return out


def numbers(flag: str, items: list[str]) -> dict[str, float]:
    """Parse items of the form `NAME=NUMBER`, each name once.

    Raises:
        InputError: items that are none, or a name that came before.
    """
    out = {}
    for name, value in pairs(flag, items).items():
        try:
            out[name] = float(value)
        except ValueError:
            raise InputError([Problem("command", flag, f"{name}={value}", "a number")]) from None
    return out


def whole_numbers(flag: str, items: list[str]) -> tuple[int, ...]:
    """Parse whole numbers.

    Raises:
        InputError: an item that is none.
    """
    try:
        return tuple(map(int, items))
    except ValueError:
        raise InputError([Problem("command", flag, " ".join(items), "a whole number each time")]) from None


_ONE: dict[str, Any] = {"str": str, "bool": bool, "int": int, "float": float}
_SEVERAL: dict[str, tuple[str, Parser]] = {
    "tuple[int, ...]": ("NUMBER", whole_numbers),
    "tuple[str, ...]": ("NAME", lambda flag, items: tuple(items)),
    "Mapping[str, str]": ("NAME=MODEL", pairs),
    "Mapping[str, ExpertSpec]": ("NAME=MODEL", pairs),
    "Mapping[str, Sequence[str]]": ("NAME=LINE", lists),
    "Mapping[str, tuple[str, ...]]": ("NAME=LINE", lists),
    "Mapping[str, DomainText]": ("NAME=TEXT[:WEIGHT]", parse_domain_texts),
    "tuple[DomainText, ...]": ("NAME=TEXT[:WEIGHT]", parse_domain_texts),
}
"""Annotation of a field to the form of its flag's values, and to what parses them."""


@dataclass(frozen=True)
class _Flag:
    """The flag of a field."""

    name: str
    annotation: Any
    parse: Parser | None = None


def _flags_of(recipe: type, rules: Mapping[str, Rule], metavars: Mapping[str, str]) -> dict[str, _Flag]:
    """Return the flags of a recipe's fields by their names; a field of another kind has none."""
    flags: dict[str, _Flag] = {}
    for item in fields(recipe):
        kind, flag = str(item.type).removesuffix(" | None"), flag_of(item)
        if kind in _SEVERAL:
            metavar, parse = _SEVERAL[kind]
            flags[item.name] = _several(recipe, item.name, flag, metavars.get(item.name, metavar), parse)
        elif kind in _ONE:
            names = f"{flag}/--no-{flag[2:]}" if item.default is True else flag
            values = choices(rules[item.name]) if item.name in rules else []
            kind_or_none: Any = _ONE[kind] | None
            chosen = option(described(recipe, item.name), names, values=values)
            flags[item.name] = _Flag(flag, Annotated[kind_or_none, chosen])
        if kind == "Mapping[str, ExpertSpec]":
            for name in ("weight", "base"):
                flags.pop(name, None)  # they follow the last of these fields
            flags["weight"] = _several(ExpertSpec, "weight", "--weight", "NAME=NUMBER", numbers)
            flags["base"] = _several(ExpertSpec, "base", "--base", "NAME=MODEL", pairs)
    return flags


def _several(cls: type, name: str, flag: str, metavar: str, parse: Parser) -> _Flag:
    help = described(cls, name, " May be repeated.")
    return _Flag(flag, Annotated[list[str] | None, option(help, flag, metavar=metavar)], parse)


def _given(flags: Mapping[str, _Flag], values: Mapping[str, Any]) -> Given:
    """Return what was given.

    Raises:
        InputError: values that are not of their flag's form; all of them.
    """
    given = Given({}, {})
    problems: list[Problem] = []
    for name, value in values.items():
        if value is None or value == []:
            continue
        given.values[name] = value
        if name in flags:
            given.flags[name] = flags[name].name
        if name in flags and (parse := flags[name].parse):
            with collecting(problems):
                given.values[name] = parse(flags[name].name, value)
    if problems:
        raise InputError(problems)
    return given
