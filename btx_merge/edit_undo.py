"""What an edit keeps so that dropping what it added gives back the same bytes.

`btx_undo.json` in an edited model holds what cannot be computed: the small files as they were, the headers of the
weights' files, and the few shared values that rounding lost on the way. It is void as soon as the model's recipe has
changed since, as it does with a finetuning.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from btx_merge.edit_recipe import EditRecipe
from btx_merge.edit_shared import Patches
from btx_merge.files import MODEL_CODE, UNDO_FILE
from btx_merge.layout import OutputTensor, Shard
from btx_merge.records import RECIPE_FILE


@dataclass(frozen=True)
class Undo:
    """The way back to the model before an edit that only added experts."""

    shared: str
    """Whether shared weights were moved by that edit: updated or kept."""
    headers: Mapping[str, bytes]
    """The beginning of every file of weights, up to its data."""
    files: Mapping[str, bytes]
    """Small files that were others, or are not there any more."""
    gone: Sequence[str]
    """Small files that were not there."""
    patches: Patches

    def layout(self) -> tuple[tuple[OutputTensor, ...], tuple[Shard, ...]]:
        """The files of weights as they were."""
        tensors, shards = [], []
        for number, (name, header) in enumerate(self.headers.items()):
            entries: dict[str, Any] = json.loads(header[8:])
            entries.pop("__metadata__", None)
            tensors += [
                OutputTensor(key, item["dtype"], tuple(item["shape"]), number, len(header) + item["data_offsets"][0])
                for key, item in entries.items()
            ]
            end = max((item["data_offsets"][1] for item in entries.values()), default=0)
            shards.append(Shard(name, header, len(header) + end))
        return tuple(tensors), tuple(shards)

    def restore_files(self, folder: Path) -> None:
        """Gives a folder with an edited model's small files those from before."""
        for name in self.gone:
            (folder / name).unlink(missing_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def find_undo(folder: Path, recipe: EditRecipe) -> Undo | None:
    """The way back, if this edit asks for just that and nothing has happened to the model since."""
    changes = (recipe.add, recipe.replace, recipe.rename, recipe.num_experts_per_tok)
    if any(changes) or not (folder / UNDO_FILE).is_file() or not (folder / RECIPE_FILE).is_file():
        return None
    try:
        values = json.loads((folder / UNDO_FILE).read_text(encoding="utf-8"))
        if set(values["drop"]) != set(recipe.drop) or values["recipe"] != _digest(folder):
            return None
        patches = {
            name: (np.frombuffer(_unpacked(places), np.int64), np.frombuffer(_unpacked(content), np.uint8))
            for name, (places, content) in values["patches"].items()
        }
        return Undo(
            values["shared"],
            {name: _unpacked(header) for name, header in values["headers"].items()},
            {name: _unpacked(content) for name, content in values["files"].items()},
            values["gone"],
            patches,
        )
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error):
        return None  # damaged: the edit goes the ordinary way


def write_undo(before: Path, after: Path, drop: Sequence[str], shared: str, patches: Patches) -> None:
    """Keeps the way back to the model in `before` beside the edited one's small files in `after`."""
    old, new = small_files(before), small_files(after)
    headers = {file.name: _header(file) for file in sorted(before.glob("*.safetensors"))}
    files = {name: file.read_bytes() for name, file in old.items()}
    kept = {name for name in files if name in new and new[name].read_bytes() == files[name]}
    values = {
        "drop": list(drop),
        "recipe": _digest(after),
        "shared": shared,
        "headers": {name: _packed(header) for name, header in headers.items()},
        "files": {name: _packed(content) for name, content in files.items() if name not in kept},
        "gone": sorted({*new, UNDO_FILE} - {*old, *MODEL_CODE}),  # a model from the Hub has no code here
        "patches": {
            name: [_packed(places.astype("<i8").tobytes()), _packed(content.tobytes())]
            for name, (places, content) in sorted(patches.items())
        },
    }
    (after / UNDO_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def small_files(folder: Path) -> dict[str, Path]:
    """Everything in a model's folder that is not weights."""
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith("."))
    return {file.name: file for file in files if file.suffix != ".safetensors"}


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / RECIPE_FILE).read_bytes()).hexdigest()


def _header(file: Path) -> bytes:
    with file.open("rb") as stream:
        length = stream.read(8)
        return length + stream.read(int.from_bytes(length, "little"))


def _packed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode()


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))
