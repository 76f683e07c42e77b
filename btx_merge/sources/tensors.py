"""All tensors of a checkpoint, from one file or from the shards that its index names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from btx_merge.architectures.llama import HEAD, is_computed
from btx_merge.checkpoints.stored import StoredTensor
from btx_merge.checkpoints.tensor_files import read_tensor_file
from btx_merge.errors import InputError, Problem, capped
from btx_merge.files.folder import COPY_THE_REST, SAVE_AGAIN, is_plain_name, read_json

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


def read_tensors(name: str, folder: Path, tied: bool = False) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint by name, without reading their data.

    Args:
        tied: whether its head is its embedding, so that the head need not be stored.

    Raises:
        InputError: every file that is missing, cannot be read, or does not agree with the index.
    """
    single, index = _first_existing(folder, _SINGLE_FILES), _first_existing(folder, _INDEXES)
    if single is not None and (index is None or single.suffix == ".safetensors"):
        try:
            return read_tensor_file(single)
        except InputError as error:
            if index is None:
                raise
            found = f"lies beside {single.name}, which cannot be read"
            remedy = f"If the shards that {index.name} names are the model, remove {single.name}."
            both = Problem(name, index.name, found, "only one of them", remedy)
            raise InputError([*error.problems, both]) from error
    if index is None:
        expected = f"{' or '.join(_SINGLE_FILES)}, or shards with their index"
        raise InputError([Problem(name, str(folder), "no weights", expected, COPY_THE_REST)])
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError([Problem(name, index.name, "no weight_map", "tensor name to file name", SAVE_AGAIN)])
    return _read_shards(name, folder, index, weight_map, tied)


def _read_shards(
    name: str, folder: Path, index: Path, weight_map: dict[str, Any], tied: bool
) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    problems: list[Problem] = []
    names: dict[str, list[str]] = {}
    for key, shard in weight_map.items():
        names.setdefault(shard, []).append(key)
    for shard in sorted(names):
        wanted = [key for key in sorted(names[shard]) if not is_computed(key) and not (tied and key == HEAD)]
        if not is_plain_name(shard):
            found, remedy = f"points outside its folder, to {shard}", "Do not use this checkpoint as it is."
            if not set(shard) & set("/\\") and shard not in ("", ".", ".."):
                found, remedy = f"names {shard[:80]!r}, which no file should be called", SAVE_AGAIN
            problems.append(Problem(name, index.name, found, "file names", remedy))
            continue
        if not (folder / shard).exists():
            if not wanted:
                continue
            remedy = "Download or copy the missing file."
            problems.append(Problem(name, shard, "missing", f"beside {index.name}, which names it", remedy))
            continue
        try:
            found_here = read_tensor_file(folder / shard)
        except InputError as error:
            problems += error.problems
            continue
        twice, lacking = [], []
        for key in sorted(found_here.keys() & tensors.keys()):
            found = f"{key} stands there and in {tensors[key].file.name}"
            twice.append(Problem(name, shard, found, "once", SAVE_AGAIN))
        for key in wanted:
            if key not in found_here:
                lacking.append(Problem(name, shard, f"lacks {key}", f"it there, by {index.name}", SAVE_AGAIN))
        problems += [*capped(twice), *capped(lacking)]
        tensors |= found_here
    if problems:
        raise InputError(problems)
    return tensors


def _first_existing(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if os.path.lexists(folder / name)), None)
