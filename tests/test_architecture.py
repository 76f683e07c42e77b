"""The package's layout: imports go one way, heavy libraries wait, only the command prints, nothing is left out."""

from __future__ import annotations

import ast
import configparser
import doctest
import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "btx_merge"
FLOORS = [
    ("reporting",),
    ("errors",),
    ("values", "options"),
    ("files",),
    ("architectures", "checkpoints", "texts", "lora", "training"),
    ("sources",),
    ("model",),
    ("fitting",),
    ("merging",),
    ("measuring",),
    ("editing", "evaluation", "exporting", "finetuning", "inspecting", "publishing"),
    ("cli",),
]
"""From the ground up. A room imports from lower floors only."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ENTRANCES = ("__init__", "__main__", "_auto_classes")
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "matplotlib")


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}
PLACED = [name for name in MODULES if name not in ENTRANCES and not name.endswith("__init__")]


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imports(name: str) -> list[tuple[str, bool]]:
    """Return what a module imports, by full name, and whether that happens while it is imported itself."""
    found: list[tuple[str, bool]] = []
    tree = tree_of(MODULES[name])
    at_once = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in at_once) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively"
            for alias in node.names:
                is_module = f"{node.module}.{alias.name}".removeprefix("btx_merge.") in MODULES
                found.append((f"{node.module}.{alias.name}" if is_module else str(node.module), id(node) in at_once))
    return found


def own(name: str) -> set[str]:
    """Return the modules of ours that a module imports, lazily or for its types too."""
    found = {module.removeprefix("btx_merge.") for module, _ in imports(name) if module.startswith("btx_merge.")}
    return {module for module in found if not module.startswith("modeling")}


def room(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("name", PLACED)
def test_a_module_imports_from_lower_floors_only(name):
    for other in own(name):
        if room(other) != room(name):
            assert FLOOR[room(other)] < FLOOR[room(name)], f"{name} imports {other}"


def test_what_derives_from_a_model_knows_no_merge():
    for name in PLACED:
        if room(name) in ("exporting", "finetuning", "publishing"):
            assert not [other for other in own(name) if room(other) in ("merging", "fitting")], name


def test_no_circle_of_modules():
    left = {name: own(name) for name in PLACED}
    while left:
        free = [name for name, needed in left.items() if not needed & left.keys()]
        assert free, f"these import each other: {', '.join(left)}"
        for name in free:
            del left[name]


def reached(name: str) -> set[str]:
    """Return a module of ours and all those that importing it imports."""
    seen, ahead = {name}, [name]
    while ahead:
        for module, is_at_once in imports(ahead.pop()):
            other = module.removeprefix("btx_merge.")
            if is_at_once and other in MODULES and other not in seen:
                seen.add(other)
                ahead.append(other)
    return seen


def test_the_command_imports_nothing_heavy():
    for name in reached("cli.app"):
        heavy = [module for module, is_at_once in imports(name) if is_at_once and module.split(".")[0] in HEAVY]
        assert not heavy, f"{name} imports {', '.join(heavy)}, and every command waits for it"


def test_only_the_command_prints():
    for name in PLACED:
        if room(name) == "cli" or name == "publishing.load_alone":  # a script of its own, whose output is read
            continue
        calls = [node for node in ast.walk(tree_of(MODULES[name])) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"], name
        assert not {"typer", "rich"} & {module.split(".")[0] for module, _ in imports(name)}, name


def test_the_model_code_stands_alone():
    for file in (ROOT / "modeling").rglob("*.py"):
        for node in ast.walk(tree_of(file)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("btx_merge")], file.name


def test_a_package_begins_with_a_docstring_and_nothing_else():
    for file in PACKAGE.rglob("__init__.py"):
        if file.parent != PACKAGE:
            (only,) = tree_of(file).body
            assert isinstance(only, ast.Expr), file


def test_setup_cfg_names_every_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = set(config["options"]["packages"].split())
    there = {".".join(file.parent.relative_to(ROOT).parts) for file in PACKAGE.rglob("__init__.py")}
    assert named == there | {"btx_merge.modeling"}


def test_modules_and_functions_can_be_read_in_one_go():
    for name, file in MODULES.items():
        text = file.read_text(encoding="utf-8")
        assert text.count("\n") <= 320, name
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.FunctionDef):
                first = node.body[0]
                is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                docstring = first.end_lineno - first.lineno + 1 if is_docstring else 0
                assert node.end_lineno - node.lineno - docstring < 60, f"{name}.{node.name}"


MANY_PARAMETERS = ("publishing.run.push",)
"""Its options are keywords that callers may already use: they stay one by one."""


def test_no_function_takes_more_than_six_parameters():
    """Only the commands do, whose parameters are flags."""
    for name, file in MODULES.items():
        for node in ast.walk(tree_of(file)):
            if (
                not isinstance(node, ast.FunctionDef)
                or room(name) == "cli"
                or f"{name}.{node.name}" in MANY_PARAMETERS
            ):
                continue
            given = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            given += [argument.arg for argument in (node.args.vararg, node.args.kwarg) if argument]
            assert len(given) - (given[:1] in (["self"], ["cls"])) <= 6, f"{name}.{node.name}"


def numbers_without_a_reason(file: Path) -> Iterator[str]:
    """Yield module-level numbers that have neither a docstring below them nor a comment beside or above them."""
    text = file.read_text(encoding="utf-8")
    body, lines = tree_of(file).body, text.splitlines()
    for node, below in zip(body, [*body[1:], None], strict=True):
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        parts = list(ast.walk(value)) if value else []
        numbers = [part for part in parts if isinstance(part, ast.Constant) and type(part.value) in (int, float)]
        is_rule = isinstance(node, ast.AnnAssign) and "Rule" in ast.unparse(node.annotation)
        if not numbers or is_rule or any(isinstance(part, ast.Lambda) for part in parts):  # rules give their reason
            continue
        is_explained = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        first = node.lineno - 1
        while lines[first - 1].strip() and first > 0 and not lines[first].startswith("#"):
            first -= 1  # a comment may stand above a group of them
        if not is_explained and not any("#" in line for line in lines[first : node.end_lineno]):
            yield lines[node.lineno - 1]


def test_a_constant_says_where_it_comes_from():
    files = {name: file for name, file in MODULES.items() if room(name) != "cli"}
    files |= {f"modeling.{file.stem}": file for file in (ROOT / "modeling").glob("*.py")}
    found = [f"{name}: {line}" for name, file in files.items() for line in numbers_without_a_reason(file)]
    assert not found, "\n".join(found)


NO_VERBS = frozenset(
    (
        *("A", "After", "All", "An", "And", "As", "At", "Because", "Before", "Both", "But", "By", "Each", "Every"),
        *("Everything", "For", "From", "He", "Here", "How", "If", "In", "It", "Many", "More", "No", "None", "Not"),
        *("Nothing", "On", "One", "Only", "Or", "Our", "She", "So", "Some", "That", "The", "There", "They"),
        *("Those", "To", "Two", "Until", "We", "What", "When", "Where", "Whether", "Which", "Who", "Whose", "Why"),
        *("With", "Without", "You"),
    )
)
VERBS_IN_S = ("Pass", "Discuss", "Process", "Compress", "Express")


def has_docstring_of_a_verb(node: ast.AST) -> bool:
    if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
        return False
    return not any("property" in ast.unparse(decorator) for decorator in node.decorator_list)  # those are nouns


def begins_with_a_verb(text: str) -> bool:
    first = text.split()[0].rstrip(",.;:")
    is_word = first.isalpha() and first[0].isupper() and first not in NO_VERBS
    return is_word and (first in VERBS_IN_S or not first.endswith("s"))


def test_a_function_says_what_it_does_with_a_verb():
    wrong = []
    files = dict(MODULES) | {f"modeling.{file.stem}": file for file in (ROOT / "modeling").glob("*.py")}
    for name, file in files.items():
        for node in filter(has_docstring_of_a_verb, ast.walk(tree_of(file))):
            if not begins_with_a_verb(ast.get_docstring(node)):
                wrong.append(f"{name}.{node.name}: {ast.get_docstring(node).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


WITH_EXAMPLES = [name for name, file in MODULES.items() if ">>> " in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_in_docstrings_hold(name):
    module = importlib.import_module(f"btx_merge.{name}")
    assert doctest.testmod(module).failed == 0
