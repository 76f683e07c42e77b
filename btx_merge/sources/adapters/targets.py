"""The modules of a base that an adapter's config asks for, by peft's own rules.

Some of the config's values are regular expressions. Those that could run for ever are tried in a process of their
own, which can be ended.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from btx_merge.architectures.llama import EMBEDDING, HEAD

_TIME_LIMIT = 5  # seconds, for all patterns of an adapter together; any that is meant takes milliseconds
_ALL_LINEAR = "all-linear"
_DEFAULT_TARGETS = ("q_proj", "v_proj")  # what peft takes for a Llama where a config names none
_TRY_ALL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
json.dump([[name for name in names if re.fullmatch(pattern, name)] for pattern in patterns], sys.stdout)
"""


def modules_of(tensors: Sequence[str]) -> list[str]:
    """Return the modules that an adapter may be put on: what has a matrix, and the head, which may be tied."""
    matrices = {name.removesuffix(".weight") for name in (*tensors, HEAD) if name.endswith(".weight")}
    return sorted(name for name in matrices if "norm" not in name.rpartition(".")[2])


class Matches:
    """The regular expressions of an adapter's config, each tried on all modules of its base once.

    Raises:
        ValueError: one cannot be understood, or takes longer than any that is meant to name a module.
    """

    def __init__(self, config: Mapping[str, Any], modules: Sequence[str]):
        patterns = sorted(set(_patterns(config)))
        self._found: dict[str, set[str]] = {}
        slow = [pattern for pattern in patterns if not _is_simple(pattern)]
        for pattern in patterns:
            if pattern not in slow:
                try:
                    self._found[pattern] = {name for name in modules if re.fullmatch(pattern, name)}
                except (re.error, OverflowError, RecursionError) as error:
                    raise ValueError(f"{_short(pattern)} is no regular expression ({error})") from error
        self._found |= zip(slow, map(set, _tried_apart(slow, modules)), strict=True) if slow else {}

    def of(self, pattern: str) -> set[str]:
        """Return the modules whose whole name matches."""
        return self._found[pattern]


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else pattern[:80] + "...")


def _is_simple(pattern: str) -> bool:
    """Return whether matching takes a number of steps that is a small power of a name's length."""
    own = pattern.replace(r"(.*\.)?", "")  # what peft puts before every name; it is harmless
    repeats = len(re.findall(r"[*+{]", own))
    return len(pattern) < 500 and repeats <= 4 and not re.search(r"\)[*+{]|\\[1-9]|\(\?P=", own)


def _tried_apart(patterns: Sequence[str], modules: Sequence[str]) -> list[list[str]]:
    command = [sys.executable, "-I", "-S", "-c", _TRY_ALL]
    shown = ", ".join(map(_short, patterns[:3]))
    try:
        done = subprocess.run(
            command, input=json.dumps([patterns, modules]), capture_output=True, text=True, timeout=_TIME_LIMIT
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{shown}: trying it on the modules' names takes over {_TIME_LIMIT} s") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ValueError(f"{shown}: not a regular expression that can be tried ({reason})")
    found: list[list[str]] = json.loads(done.stdout)
    return found


def by_key(key: str) -> str:
    """Return the expression by which peft looks a module up in alpha_pattern and rank_pattern."""
    return rf"(.*\.)?({key})"


def _as_saved(name: str) -> str:
    return rf"(.*\.)?({name})(\..*)?"


def _as_layers(name: str) -> str:
    return rf"(.*\.)?({name})\.\d+\..*"


def _patterns(config: Mapping[str, Any]) -> Iterator[str]:
    for key in ("alpha_pattern", "rank_pattern"):
        yield from map(by_key, _strings(config, key, dict))
    for key in ("target_modules", "exclude_modules", "feedforward_modules"):
        if isinstance(config.get(key), str) and config[key] != _ALL_LINEAR:
            yield config[key]
    yield from map(_as_saved, _strings(config, "modules_to_save", list))
    yield from map(_as_layers, _strings(config, "layers_pattern", list))
    yield from map(by_key, _strings(config, "target_parameters", list))


def _strings(config: Mapping[str, Any], key: str, kind: type[Any]) -> list[str]:
    """Return the strings of a list, or the keys of an object; one string alone where a list is expected."""
    value: Any = config.get(key) or kind()
    if kind is list and isinstance(value, str):
        value = [value]
    if not isinstance(value, kind):
        raise ValueError(f"{key} is {_short(str(config[key]))}")
    strings: list[str] = list(value)
    if not all(isinstance(item, str) for item in strings):
        raise ValueError(f"{key} is {_short(str(config[key]))}")
    return strings


def targeted(config: Mapping[str, Any], modules: Sequence[str], matches: Matches) -> set[str]:
    """Return the modules that a LoRA with this config has factors for (peft's `check_target_module_exists`).

    Raises:
        ValueError: a key has a value that is not of its kind.
    """
    targets = config.get("target_modules")
    if targets == _ALL_LINEAR:
        found = {name for name in modules if f"{name}.weight" not in (EMBEDDING, HEAD)}
    elif isinstance(targets, str):
        found = matches.of(targets)
    else:
        names = _strings(config, "target_modules", list) if targets is not None else _DEFAULT_TARGETS
        found = {module for module in modules if _is_one_of(module, names)} & _in_layers(config, modules, matches)
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        found = found - matches.of(excluded)
    else:
        names = _strings(config, "exclude_modules", list)
        found = {module for module in found if not _is_one_of(module, names)}
    for name in _strings(config, "modules_to_save", list):
        found = found - matches.of(_as_saved(name))
    return found


def _is_one_of(module: str, names: Sequence[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _in_layers(config: Mapping[str, Any], modules: Sequence[str], matches: Matches) -> set[str]:
    """Return the modules of the layers that an adapter is limited to; all where it is not."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return set(modules)
    layers = [layers] if isinstance(layers, int) else layers
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise ValueError(f"layers_to_transform is {_short(str(layers))}")
    patterns = _strings(config, "layers_pattern", list)
    of_patterns = set().union(*(matches.of(_as_layers(pattern)) for pattern in patterns))
    found = set()
    for module in modules:
        number = re.search(r"\.(\d+)\.", module)
        if number and int(number[1]) in layers and (module in of_patterns or not patterns):
            found.add(module)
    return found


def saved_whole(config: Mapping[str, Any], tensors: Sequence[str], targets: set[str]) -> set[str]:
    """Return the base's tensors that the file must hold whole: of modules_to_save, and trained biases.

    Raises:
        ValueError: a key has a value that is not of its kind.
    """
    names = _strings(config, "modules_to_save", list)
    found = set()
    for tensor in tensors:
        module, _, kind = tensor.rpartition(".")
        parents = [module[: end.start()] for end in re.finditer(r"\.|$", module)]
        if any(parent.endswith(name) for parent in parents for name in names):
            found.add(tensor)
        is_trained = config.get("bias") == "all" or (config.get("bias") == "lora_only" and module in targets)
        if kind == "bias" and is_trained:
            found.add(tensor)
    return found
