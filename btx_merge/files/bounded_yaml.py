"""YAML that others wrote, read so that no text can take long, fill the memory or raise an error of another kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from btx_merge.errors import InputError, Problem
from btx_merge.reporting import printable

# A recipe of hundreds of experts has some thousand values at a depth of 5; the limits are ten times that and more, and
# a text that reaches them all is still read in a few seconds. Python converts numbers of more digits slowly.
_MOST_CHARACTERS = 2_000_000
_MOST_NODES = 50_000
_MOST_DEPTH = 50
_MOST_DIGITS = 100
_NO_NAME = 'in "<unicode string>", '
"""What PyYAML writes before a line and column of a text that is no file to it."""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with limits, in which no key stands twice.

    An alias counts as much as what it stands for: eight lines of nine aliases each would be 43 million values.
    """

    def __init__(self, text: str, most_nodes: int) -> None:
        super().__init__(text)
        self._most_nodes, self._nodes, self._depth = most_nodes, 0, 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.get_mark()
        before = self._nodes
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if node is None or node not in self._sizes:
                raise ConstructorError(None, None, "an alias stands inside of what it stands for", mark)
            self._nodes += self._sizes[node]
        else:
            self._depth += 1
            if self._depth > _MOST_DEPTH:
                raise ConstructorError(None, None, f"more than {_MOST_DEPTH} levels", mark)
            node = super().compose_node(parent, index)
            self._depth -= 1
            self._nodes += 1
            if node is not None:
                self._sizes[node] = self._nodes - before
        if self._nodes > self._most_nodes:
            raise ConstructorError(None, None, f"more than {self._most_nodes:,} values", mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag in _NUMBERS and len(node.value) > _MOST_DIGITS:
            raise ConstructorError(None, None, f"a number of {len(node.value)} characters", node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # as PyYAML's own do
            kind = node.tag.rpartition(":")[2]
            found = f"{printable(str(node.value), 100)} cannot be read as {kind}"
            raise ConstructorError(None, None, found, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()  # PyYAML takes the last of two equal keys: an expert would vanish without a word
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                twice = f"the key {printable(key.value, 100)} stands there twice"
                raise ConstructorError(None, None, twice, node.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, most_nodes: int = _MOST_NODES) -> Any:
    """Return what a YAML text holds: plain values.

    Raises:
        yaml.YAMLError: the text is no YAML, or has more than a file of ours could ever have.
    """
    loader = _Loader(text, most_nodes)
    try:
        return loader.get_single_data()
    except (ArithmeticError, ValueError) as error:  # an escape for a letter that there is not
        raise ConstructorError(None, None, str(error), loader.get_mark()) from error
    finally:
        loader.dispose()


def read_yaml(file: Path, source: str, expected: str) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        InputError: the file is missing, is no YAML or no mapping, or is larger than any that is meant.
    """
    try:
        with file.open(encoding="utf-8") as handle:
            text = handle.read(_MOST_CHARACTERS + 1)
        if len(text) > _MOST_CHARACTERS:
            found = f"more than {_MOST_CHARACTERS:,} characters"
            raise InputError([Problem(source, str(file), found, expected, "Is this the right file?")])
        values = parse_yaml(text)
    except OSError as error:
        raise InputError([Problem(source, str(file), error.strerror or str(error))]) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or no name that a file can have
        reason = " ".join(str(error).split()).replace(_NO_NAME, "in ")
        raise InputError([Problem(source, str(file), f"unreadable: {reason}")]) from error
    if not isinstance(values, dict):
        raise InputError([Problem(source, str(file), "no keys", expected)])
    return values
