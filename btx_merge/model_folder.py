"""A merged model that something is to be made of: is it one, and is there a place for the result?"""

from __future__ import annotations

import shutil
from pathlib import Path

from btx_merge.errors import InputError, Problem
from btx_merge.folder_files import file_problems, small_files
from btx_merge.hub import Located, locate
from btx_merge.merged_model import MergedModel, open_merged
from btx_merge.records import read_record
from btx_merge.writer import check_target


def find_model(reference: str, target: Path, overwrite: bool) -> tuple[Located | None, list[Problem]]:
    """The model's folder, if it is one; and all that speaks against writing a changed copy of it to `target`."""
    model, problems = open_model(reference, target, overwrite)
    if model is None:
        return None, problems
    folder = model.located.folder
    problems += file_problems(folder, [*small_files(folder)])
    try:
        read_record(folder)
    except InputError as error:
        problems += error.problems
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        problems.append(Problem("model", str(folder), "no tokenizer", "tokenizer.json or tokenizer.model"))
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    room = next(folder for folder in (target, *target.parents) if folder.exists())
    if weights > (free := shutil.disk_usage(room).free):
        expected = f"{weights / 1e9:.2f} GB for the result alone"
        problems.append(Problem("output", str(room), f"{free / 1e9:.2f} GB free", expected, "Make room."))
    return model.located, problems


def open_model(reference: str, target: Path, overwrite: bool) -> tuple[MergedModel | None, list[Problem]]:
    """The model, opened without reading weights; and all that speaks against writing something of it to `target`."""
    problems: list[Problem] = []
    try:
        check_target(target, overwrite)
    except InputError as error:
        problems += error.problems
    try:
        located = locate("model", reference)
        if target in (located.folder.resolve(), *located.folder.resolve().parents):
            problems.append(Problem("output", str(target), "is where the model lies", "", "Give another --output."))
        return open_merged(located), problems
    except InputError as error:
        return None, [*problems, *error.problems]
