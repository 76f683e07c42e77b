"""Checks of a folder before it is published as it is: it is complete, it loads, and it holds nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btx_merge.checkpoints.layout import INDEX_FILE
from btx_merge.checkpoints.stored import StoredTensor
from btx_merge.errors import InputError, Problem
from btx_merge.files.folder import read_json, read_text
from btx_merge.model.card import with_path
from btx_merge.model.files import MODEL_CODE
from btx_merge.publishing.adapter import published_adapter
from btx_merge.publishing.card import card_problems
from btx_merge.publishing.kinds import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BTX, Kind, kind_of
from btx_merge.publishing.private_text import private_text
from btx_merge.sources.tensors import read_tensors

_OTHER_FILES = re.compile(r"README\.md|\.gitattributes|(?:LICEN[SC]E|NOTICE|COPYING|USE_POLICY)[\w.-]*", re.IGNORECASE)
_PASSED_OVER = (".git", ".DS_Store", "runs")  # runs: TensorBoard's, with the host's name
_PIPELINES = {
    "BTXModel": "feature-extraction",
    "BTXForSequenceClassification": "text-classification",
    "BTXForTokenClassification": "token-classification",
}
_MOVE = "Move it away: only the model is published."
_SHOWN = 3
"""Names that an error lists; the others are counted."""


@dataclass(frozen=True)
class Publishable:
    """A folder that may be published."""

    folder: Path
    files: tuple[str, ...]
    """Names relative to the folder, the weights first."""
    warnings: tuple[Problem, ...]
    kind: Kind
    changed: Mapping[str, str]
    """Files that are published otherwise than they lie there, with their text."""

    def content(self, name: str) -> Path | bytes:
        """Return what is to be sent of a file."""
        return self.changed[name].encode() if name in self.changed else self.folder / name


def examine(folder: Path, repo_id: str = "", base_model: str | None = None) -> Publishable:
    """Return everything that will be sent, if it all may be. Reads no weights, only their headers.

    Takes as long as importing transformers: the model is built in a process of its own, on the meta device, without
    btx-merge.

    Args:
        repo_id: where it is to be published, for the code in its card; empty leaves that as it is.
        base_model: of an adapter, `org/name` or `org/name@revision`, where another than the recorded one is meant.

    Raises:
        InputError: every reason not to publish it.
    """
    if not folder.is_dir():
        expected = "a folder that btx merge, fit, train, edit, export or extract wrote"
        raise InputError([Problem("model", str(folder), "no such folder", expected, "Check the path.")])
    # All checks run before anything is raised: whoever mends a folder wants one list.
    card, of_card = _card_text(folder)
    kind, config = _kind(folder, card)
    wrong: list[Problem] = []
    warnings: list[Problem] = []
    changed: dict[str, str] = {}
    if repo_id:
        card = with_path(card, repo_id)
    if base_model is not None and not kind.is_adapter:
        wrong.append(Problem("command", "--base-model", f"given, but this is {kind.text}", "", "Leave it out."))
    if kind.is_adapter:
        changed, of_adapter = published_adapter(folder, card, base_model)
        wrong += of_adapter
        card = changed.get("README.md", card)
        weights, stored = {ADAPTER_WEIGHTS}, None
    else:
        weights, stored, of_model = _model(folder, config)
        wrong += of_model
    names, foreign = _files(folder, weights, kind)
    wrong += foreign
    wrong += _missing(names, kind)
    if kind is not BTX or set(MODEL_CODE) <= set(names):
        wrong += _loading_problems(folder, stored)
    texts = [name for name in names if not name.endswith((".safetensors", ".png"))]
    if not of_card:
        changed["README.md"] = card
        of_card, warnings = card_problems(card, _pipeline(config), kind)
    wrong += private_text(folder, texts, changed)
    if wrong or of_card:
        raise InputError([*wrong, *of_card])
    changed = {name: text for name, text in changed.items() if text.encode() != (folder / name).read_bytes()}
    ordered = tuple(sorted(names, key=lambda name: (name not in weights, name)))
    return Publishable(folder, ordered, tuple(warnings), kind, changed)


def _kind(folder: Path, card: str) -> tuple[Kind, dict[str, Any]]:
    """Return what the folder holds, with its config; of an adapter an empty one.

    Raises:
        InputError: nothing that btx-merge makes.
    """
    name: object = "adapter"
    config: dict[str, Any] = {}
    where = ADAPTER_CONFIG
    if not (folder / ADAPTER_CONFIG).exists():
        try:
            config = read_json(folder / "config.json")
        except InputError as error:
            raise InputError([_of_model(problem) for problem in error.problems]) from None
        name, where = config.get("model_type"), "config.json: model_type"
    kind = kind_of(name, {file.name for file in folder.iterdir()}, card)
    if kind is None:
        expected = "'btx', or what btx export, extract or train made, with its btx_recipe.yaml or its card"
        raise InputError([Problem("model", where, repr(name), expected, "Merge first: btx merge.")])
    return kind, config


def _model(
    folder: Path, config: Mapping[str, Any]
) -> tuple[set[str], Mapping[str, StoredTensor] | None, list[Problem]]:
    """Return the names of the weights, the stored tensors if they can be read, and what is wrong."""
    problems: list[Problem] = []
    if config.get("quantization_config") is not None:
        remedy = "Publish the model as it was; whoever loads it can quantise it."
        problems.append(Problem("model", "config.json", "a quantised model", "plain weights", remedy))
    stored: Mapping[str, StoredTensor] | None = None
    try:
        stored = _weights(folder)
    except InputError as error:
        problems += [_of_model(problem) for problem in error.problems]
    return _weight_names(folder), stored, problems


def _missing(names: list[str], kind: Kind) -> list[Problem]:
    """Find what a model cannot do without. An adapter has its base's tokenizer."""
    problems = []
    if kind is BTX:
        problems += [
            Problem("model", name, "missing", "the model's code", "Copy it from another merge: btx merge writes it.")
            for name in MODEL_CODE
            if name not in names
        ]
    if not kind.is_adapter and not {"tokenizer.json", "tokenizer.model"} & set(names):
        problems.append(Problem("model", "tokenizer.json", "missing", "it or tokenizer.model"))
    return problems


def _of_model(problem: Problem) -> Problem:
    """Rename the source of a problem that another module found to the one that is used here."""
    return Problem("model", Path(problem.where).name, problem.found, problem.expected, problem.remedy)


def _card_text(folder: Path) -> tuple[str, list[Problem]]:
    """Return the model card, empty where there is none that can be read, and what is wrong then."""
    if not os.path.lexists(folder / "README.md"):
        return "", [Problem("model", "README.md", "missing", "a model card", "btx merge writes one.")]
    try:
        return read_text(folder / "README.md"), []
    except InputError as error:
        return "", [_of_model(problem) for problem in error.problems]


def _pipeline(config: Mapping[str, Any]) -> str:
    return _PIPELINES.get(next(iter(config.get("architectures") or []), ""), "text-generation")


def _files(folder: Path, weights: set[str], kind: Kind) -> tuple[list[str], list[Problem]]:
    """List what is to be sent, and what has no business there."""
    names, problems = [], []
    entries = list(folder.iterdir())
    entries += [*(folder / "additional_chat_templates").glob("*")]
    for entry in sorted(entries):
        name = entry.relative_to(folder).as_posix()
        if name in _PASSED_OVER or (
            name == ".cache" and not {path.name for path in entry.glob("*")} - {"huggingface"}
        ):
            continue
        if entry.is_symlink() and not entry.resolve().is_relative_to(folder.resolve()):
            problems.append(
                Problem("model", name, "a link out of the folder", "a file", "Put the file itself in its place.")
            )
        elif name == "additional_chat_templates" and entry.is_dir():
            continue
        elif entry.is_dir():
            problems.append(Problem("model", name, "a folder that is no part of a model", "", _MOVE))
        elif name in weights or _OTHER_FILES.fullmatch(name):
            names.append(name)
        elif name.endswith(".safetensors"):
            remedy = "Move it away: it seems to be left from another save."
            problems.append(Problem("model", name, "weights that are no part of this model", "", remedy))
        elif kind.has(name):
            names.append(name)
        else:
            problems.append(Problem("model", name, "a file that is no part of a model", "", _MOVE))
    return names, problems


def _weight_names(folder: Path) -> set[str]:
    """Return the files that hold the weights, as far as can be known."""
    try:
        named = {file for file in read_json(folder / INDEX_FILE)["weight_map"].values() if isinstance(file, str)}
    except (InputError, KeyError, AttributeError):
        named = set()
    return named or {"model.safetensors"}


def _weights(folder: Path) -> Mapping[str, StoredTensor]:
    """Return the stored tensors by name.

    Raises:
        InputError: a file is missing or damaged, or the index lies.
    """
    single, index = folder / "model.safetensors", folder / INDEX_FILE
    if not single.exists() and not index.exists():
        expected = f"model.safetensors, or shards with {INDEX_FILE}"
        raise InputError([Problem("model", folder.name, "no weights", expected, "Copy the missing file there.")])
    if single.exists() and index.exists():
        remedy = "Remove what is left from another save."
        raise InputError([Problem("model", INDEX_FILE, "lies beside model.safetensors", "one of the two", remedy)])
    tensors = read_tensors("model", folder)
    if index.exists() and (extra := sorted(tensors.keys() - read_json(index)["weight_map"].keys())):
        raise InputError([Problem("model", INDEX_FILE, f"does not name {_some(extra)}, which the shards hold")])
    return tensors


def _loading_problems(folder: Path, stored: Mapping[str, StoredTensor] | None) -> list[Problem]:
    """Find what a stranger would meet who loads the folder."""
    answer = _load(folder.resolve())
    problems = [
        Problem("model", where, f"does not load where btx-merge is not installed ({found})")
        for where, found in answer["problems"]
    ]
    if answer["tensors"] is not None and stored is not None:
        problems += _tensor_problems({name: tuple(shape) for name, shape in answer["tensors"].items()}, stored)
    return problems


def _load(folder: Path) -> dict[str, Any]:
    """Run `load_alone.load` in a process that has no token and a cache of its own."""
    script = Path(__file__).with_name("load_alone.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="btx-load-") as scratch:
        kept = {key: value for key, value in os.environ.items() if "TOKEN" not in key}
        own = {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        # First, or a cache that the user's path holds would be searched for the code that transformers copies here.
        own["PYTHONPATH"] = os.pathsep.join(filter(None, [scratch, kept.get("PYTHONPATH")]))
        result = Path(scratch) / "result.json"
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder), str(result)],
            env={**kept, **own},
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if not result.exists():
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            return {"problems": [[folder.name, reason]], "tensors": None}
        answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return answer


def _tensor_problems(wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor]) -> list[Problem]:
    """Compare the tensors in the files with those that the model wants by its config."""
    problems = []
    remedy = "Copy or save the model again."
    if missing := sorted(wanted.keys() - stored.keys()):
        problems.append(Problem("model", "weights", f"lack {_some(missing)}", "every tensor of the config", remedy))
    if extra := sorted(stored.keys() - wanted.keys()):
        found = f"hold {_some(extra)}, which a model of this config does not have"
        problems.append(Problem("model", "weights", found, "the tensors of the config", remedy))
    others = [name for name in sorted(wanted.keys() & stored.keys()) if stored[name].shape != wanted[name]]
    if others:
        first = others[0]
        found = f"{first} is {list(stored[first].shape)}" + (
            f", and {len(others) - 1} more are wrong" * (len(others) > 1)
        )
        expected = f"{list(wanted[first])} by config.json"
        problems.append(Problem("model", stored[first].file.name, found, expected, remedy))
    return problems


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
