"""Open a merged model and check that the output can be written."""

from __future__ import annotations

import shutil
from pathlib import Path

from btx_merge.errors import Problem, collecting
from btx_merge.files.folder import file_problems, small_files
from btx_merge.files.placing import check_target, partial_of
from btx_merge.model.merged import MergedModel, open_merged
from btx_merge.model.records import read_record
from btx_merge.reporting import readable
from btx_merge.sources.locate import Located, locate
from btx_merge.sources.side_files import side_file_problems
from btx_merge.sources.tokenizer_files import no_tokenizer


def find_model(reference: str, target: Path, overwrite: bool) -> tuple[Located | None, list[Problem]]:
    """Return the model's folder, if it is one, and all reasons not to write a changed copy of it to `target`."""
    model, problems = open_model(reference, target, overwrite)
    if model is None:
        return None, problems
    folder = model.located.folder
    problems += file_problems(folder, [*small_files(folder)])
    with collecting(problems):
        read_record(folder)
    problems += no_tokenizer("model", folder)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    problems += room_problems(target, weights)
    return model.located, problems or refused_config("model", folder)


def refused_config(name: str, folder: Path) -> list[Problem]:
    """Return why a model's code, ours or transformers', refuses its config.json. People change that file by hand.

    It imports transformers, which takes seconds: for the end, where nothing else is wrong.
    """
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder)
    except Exception as error:  # of any kind: transformers raises what its own code meets
        found = f"refused by the model's code ({type(error).__name__}: {' '.join(str(error).split()).rstrip('.')})"
        return [Problem(name, "config.json", found, "", "Correct the file.")]
    return []


def room_problems(target: Path, nbytes: int) -> list[Problem]:
    """Return whether the disk has too little room for a result of so many bytes in `target`.

    What an interrupted run has written beside it already counts as room.
    """
    folder = next(folder for folder in (target, *target.parents) if folder.exists())
    partial = partial_of(target)
    present = sum(file.lstat().st_blocks * 512 for file in partial.iterdir()) if partial.is_dir() else 0
    free = shutil.disk_usage(folder).free
    if nbytes - present <= free:
        return []
    expected = f"{readable(nbytes - present)} for the result"
    remedy = "Make room, or write to another disk."
    return [Problem("output", str(folder), f"{readable(free)} free", expected, remedy)]


def overlap_problems(folder: Path, target: Path | None) -> list[Problem]:
    """Return whether a result in `target` would replace the folder that it is made from.

    A result gets its name by taking the place of what had it: that must not be the model, or hold it.
    """
    if target not in (folder.resolve(), *folder.resolve().parents):
        return []
    return [Problem("output", str(target), "is where the model lies", "", "Give another --output.")]


def open_model(reference: str, target: Path | None, overwrite: bool) -> tuple[MergedModel | None, list[Problem]]:
    """Open the model without reading weights; return with it all reasons not to write a result to `target`.

    Args:
        target: the folder for the result; None where the result is no folder.
    """
    problems: list[Problem] = []
    model: MergedModel | None = None
    with collecting(problems):
        if target is not None:
            check_target(target, overwrite)
    with collecting(problems):
        located = locate("model", reference)
        problems += overlap_problems(located.folder, target)
        problems += side_file_problems("model", located.folder)
        model = open_merged(located)
    return model, problems
