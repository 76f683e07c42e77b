"""A merged model that something is to be made of: is it one, and is there a place for the result?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from btx_merge.errors import InputError, Problem
from btx_merge.hub import Located, locate
from btx_merge.merged_model import MergedModel, open_merged
from btx_merge.writer import check_target


def find_model(reference: str, target: Path, overwrite: bool) -> tuple[Located | None, list[Problem]]:
    """The model's folder, if it was found; and all that speaks against writing a changed copy of it to `target`."""
    located, problems = _locate_apart(reference, target, overwrite)
    return located, problems + (_problems_of(located, target) if located else [])


def open_model(reference: str, target: Path, overwrite: bool) -> tuple[MergedModel | None, list[Problem]]:
    """The model, opened without reading weights; and all that speaks against writing something of it to `target`."""
    located, problems = _locate_apart(reference, target, overwrite)
    try:
        return (open_merged(located) if located else None), problems
    except InputError as error:
        return None, [*problems, *error.problems]


def _locate_apart(reference: str, target: Path, overwrite: bool) -> tuple[Located | None, list[Problem]]:
    problems: list[Problem] = []
    located = None
    try:
        check_target(target, overwrite)
    except InputError as error:
        problems += error.problems
    try:
        located = locate("model", reference)
        if target in (located.folder.resolve(), *located.folder.resolve().parents):
            problems.append(Problem("output", str(target), "is where the model lies", "", "Give another --output."))
    except InputError as error:
        problems += error.problems
    return located, problems


def _problems_of(located: Located, target: Path) -> list[Problem]:
    try:
        config = json.loads((located.folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"no JSON ({error})"
        return [Problem("model", str(located.folder / "config.json"), str(reason), "a checkpoint of `btx merge`")]
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "btx":
        remedy = "Merge first: btx merge."
        return [Problem("model", "config.json: model_type", f"{kind!r}", "'btx'", remedy)]
    problems = []
    has_tokenizer = any((located.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    if not has_tokenizer:
        problems.append(Problem("model", str(located.folder), "no tokenizer", "tokenizer.json or tokenizer.model"))
    weights = sum(file.stat().st_size for file in located.folder.glob("*.safetensors"))
    if not weights:
        problems.append(Problem("model", str(located.folder), "no weights", "*.safetensors"))
    room = next(folder for folder in (target, *target.parents) if folder.exists())
    if weights > (free := shutil.disk_usage(room).free):
        expected = f"{weights / 1e9:.2f} GB for the result alone"
        problems.append(Problem("output", str(room), f"{free / 1e9:.2f} GB free", expected, "Make room."))
    return problems
