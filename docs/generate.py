"""Write what the documentation repeats: `options.md` and `api.md` from docstrings, the tables of `reproduction.md`
and of the README.

python docs/generate.py
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import typer

import btx_merge
import btx_merge.lora
import btx_merge.training
from btx_merge import (
    BranchRecipe,
    DomainText,
    EditRecipe,
    EvalRecipe,
    ExpertSpec,
    FitRecipe,
    MergeRecipe,
    Options,
    Reporter,
    RoutingRecipe,
    TrainRecipe,
)
from btx_merge.cli.app import app
from btx_merge.finetuning.arguments import known_names
from btx_merge.values import field_descriptions

FOLDER = Path(__file__).resolve().parent
REPEAT = "This page is written by `make docs` from the docstrings; do not change it by hand."

RECIPES: dict[type, tuple[str, dict[str, str]]] = {
    MergeRecipe: ("merge", {"seed_weight": "--weight seed=NUMBER"}),
    ExpertSpec: ("merge", {"model": "--expert NAME=MODEL"}),
    FitRecipe: ("fit", {}),
    BranchRecipe: ("branch", {"arguments": "each by its name"}),
    TrainRecipe: ("train", {"arguments": "each by its name"}),
    EditRecipe: ("edit", {}),
    RoutingRecipe: ("routing", {}),
    EvalRecipe: ("eval", {}),
    DomainText: ("", {"name": "NAME=", "references": "TEXT, again for each", "weight": ":WEIGHT"}),
}
"""Each recipe, the verb that takes it, and where its values stand if not at an option of their own."""


def options_page() -> str:
    """Return the page of all options: those of every recipe, and those of the command that are part of none."""
    parts = [
        "# Options",
        "Everything that can be chosen. A *key* stands in a recipe: in a YAML file, or in Python as an argument of "
        "the class. The *flag* says the same on the command line, and wins over a file. `btx merge --print-recipe` "
        "writes a recipe with all keys of a merge.",
        REPEAT,
    ]
    for recipe, (verb, flags) in RECIPES.items():
        parts += [f"## {recipe.__name__}", *([f"For `btx {verb}`."] if verb else []), first_paragraph(recipe)]
        parts.append(_table(["key", "flag", "default", "what it is"], _option_rows(recipe, verb, flags)))
        if recipe is TrainRecipe:
            parts += [
                "All of `TrainingArguments` are options of `btx branch` and of `btx train` by their names. "
                "`--help` names these:",
                _table(["flag", "what it is"], _trainer_rows()),
            ]
    parts += [
        "## Of the command alone",
        "These say how the work is done, and are part of no recipe.",
        _table(["flag", "verbs", "what it does"], _command_rows()),
    ]
    return "\n\n".join(parts) + "\n"


def api_page() -> str:
    """Return the page of the Python API: every public name with its docstring."""
    names = [getattr(btx_merge, name) for name in btx_merge.__all__]
    functions = [item for item in names if not isinstance(item, type)]
    errors = [item for item in names if isinstance(item, type) and issubclass(item, BaseException)]
    classes = [item for item in names if isinstance(item, type) and item not in errors]
    parts = [
        "# Python API",
        "Every name on this page comes from `btx_merge` itself, but for the last two sections. "
        "[Options](options.md) has the values of the recipes.",
        REPEAT,
    ]
    for title, members in (("Verbs", functions), ("Recipes, options and reports", classes), ("Errors", errors)):
        parts += [f"## {title}", *(part for member in members for part in _described(member))]
    for module, members in (
        (btx_merge.lora, [btx_merge.lora.lora_config]),
        (btx_merge.training, [btx_merge.training.GumbelAnnealing, btx_merge.training.RouterBiasUpdate]),
    ):
        parts += [f"## {module.__name__}", first_paragraph(module)]
        parts += [part for member in members for part in _described(member)]
    return "\n\n".join(parts) + "\n"


def with_tables(page: Path) -> str:
    """Return a page as it is, each of its tables of the reproduction made anew from the figures of the study.

    A table stands between `<!-- table: NAME -->` and `<!-- end -->`.

    Raises:
        KeyError: the page has a table that the study has not.
    """
    sys.path.insert(0, str(FOLDER.parent / "examples"))
    try:
        from reproduce_tables import blocks
    finally:
        sys.path.pop(0)
    tables = blocks(json.loads((FOLDER / "reproduction.json").read_text(encoding="utf-8")))

    def table(mark: re.Match[str]) -> str:
        return f"{mark[1]}\n{tables[mark[2]]}\n{mark[3]}"

    text = page.read_text(encoding="utf-8")
    return re.sub(r"(<!-- table: (.+?) -->)\n.*?(<!-- end -->)", table, text, flags=re.DOTALL)


def first_paragraph(item: Any) -> str:
    """Return the first paragraph of a docstring as one line."""
    return " ".join((inspect.getdoc(item) or "").split("\n\n")[0].split())


def _option_rows(recipe: type, verb: str, flags: dict[str, str]) -> Iterator[list[str]]:
    descriptions = field_descriptions(recipe)
    known = {param.name: param for param in _command(verb).params} if verb else {}
    for item in fields(recipe):
        if item.name == "resolved":  # for a merge to write
            continue
        flag = flags.get(item.name) or _flag(known[item.name])
        yield [f"`{item.name}`", f"`{flag}`", _default(item), descriptions.get(item.name, "")]


def _flag(param: Any) -> str:
    """Return how a parameter of the command is given."""
    if param.param_type_name == "argument":
        return str(param.name).upper()
    flag = ", ".join(name for name in param.opts + param.secondary_opts if name.startswith("--"))
    return f"{flag} {param.metavar}" if param.metavar else flag


def _trainer_rows() -> Iterator[list[str]]:
    """Return the arguments of the Trainer that `btx train --help` names."""
    for param in _command("train").params:
        if param.name in known_names():
            yield [f"`{param.opts[0]}`", param.help]


def _command_rows() -> Iterator[list[str]]:
    """Return the options of the command that no recipe has, each once, with the verbs that have it."""
    verbs: dict[tuple[str, str], list[str]] = {}
    for verb in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        taken = {"weight", "base", *(known_names() if verb in ("branch", "train") else ())}
        for recipe, (of_verb, _) in RECIPES.items():
            if of_verb == verb or (of_verb, verb) == ("merge", "check"):
                taken |= {item.name for item in fields(recipe)}
        for param in _command(verb).params:
            if param.name not in taken and param.param_type_name == "option":
                flag = ", ".join(f"`{name}`" for name in param.opts)
                verbs.setdefault((flag, " ".join((param.help or "").split())), []).append(verb)
    for (flag, text), having in sorted(verbs.items()):
        yield [flag, ", ".join(having), text]


def _command(verb: str) -> Any:
    return typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]


def _default(item: Field[Any]) -> str:
    if item.default is not MISSING:
        return "" if item.default in (None, ()) else f"`{_plain(item.default)}`"
    return "needed" if item.default_factory is MISSING else ""


def _plain(value: Any) -> str:
    """Return a value as one would write it in YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _described(item: Any) -> Iterator[str]:
    """Return a public name: a heading, how it is called, and what its docstring says."""
    yield f"### {item.__name__}"
    if not isinstance(item, type):
        yield f"```py\n{_call(item)}\n```"
    elif not is_dataclass(item) and "__init__" in vars(item):
        yield f"```py\n{_call(item.__init__, item.__name__)}\n```"
    yield _markdown(inspect.getdoc(item) or "")
    if isinstance(item, type) and issubclass(item, btx_merge.BTXError) and item is not btx_merge.BTXError:
        yield f"A kind of `{item.__base__.__name__}`."
    if item in RECIPES:
        yield f"Its values: [options](options.md#{item.__name__.lower()})."
    elif is_dataclass(item):
        described = field_descriptions(item)
        rows = [[f"`{member.name}`", f"`{member.type}`", described.get(member.name, "")] for member in fields(item)]
        yield _table(["attribute", "type", "what it is"], rows)
    for name, member in vars(item).items() if isinstance(item, type) else ():
        if name.startswith(("_", "on_")) or not inspect.getdoc(member):  # `on_...`: for the Trainer to call
            continue
        if isinstance(member, property):
            yield f"**`{name}`** — {first_paragraph(member)}"
        elif isinstance(member, (types.FunctionType, classmethod)):
            function = getattr(member, "__func__", member)
            yield f"```py\n{_call(function)}\n```\n\n{_markdown(inspect.getdoc(function) or '')}"


def _call(function: Callable[..., Any], name: str = "") -> str:
    """Return a function's signature, on one line or with a line for each parameter."""
    parts, keyword_only = [], False
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
            keyword_only = True
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        text = f"{stars}{parameter.name}: {parameter.annotation}"
        default = parameter.default
        shown = f"{type(default).__name__}()" if isinstance(default, (Options, Reporter)) else repr(default)
        parts.append(text if default is parameter.empty else f"{text} = {shown}")
    end = ")" if name else f") -> {signature.return_annotation}"
    line = f"{name or function.__name__}({', '.join(parts)}{end}"
    if len(line) <= 100:
        return line
    return f"{name or function.__name__}(\n" + "".join(f"    {part},\n" for part in parts) + end


def _markdown(docstring: str) -> str:
    """Return a docstring with its sections (`Args:`, `Raises:`) as lists."""
    titles = {"Args": "Arguments", "Raises": "Raises", "Returns": "Returns", "Warns": "Warns"}
    lines: list[str] = []
    in_section = False
    for line in docstring.splitlines():
        if match := re.fullmatch(r"(\w+):", line):
            in_section = match[1] in titles
            lines += [f"**{titles[match[1]]}**", ""] if in_section else [line]
        elif in_section and re.match(r"    \S", line):
            name, colon, rest = line.strip().partition(":")
            lines.append(f"- `{name}`:{rest}" if colon else f"- {name}")
        else:
            lines.append(f"  {line.strip()}".rstrip() if in_section else line)
    return "\n".join(lines)


def _table(head: list[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


PAGES: dict[str, Callable[[], str]] = {
    "options.md": options_page,
    "api.md": api_page,
    "reproduction.md": partial(with_tables, FOLDER / "reproduction.md"),
    "../README.md": partial(with_tables, FOLDER.parent / "README.md"),
}
"""Each page that is generated, or its tables, and what returns it."""


def main() -> None:
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
