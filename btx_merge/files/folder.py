"""Files that a model's folder brings, where the folder may be anybody's: a download, a clone, an unpacked archive.

Every such file is read and copied through this module. It refuses a name that leads out of the folder, a link that
does, what is no plain file (a pipe would be waited for without end), and a file that is far too large for its kind.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from btx_merge.errors import InputError, Problem
from btx_merge.files.bounded_json import parse_json
from btx_merge.files.disk_errors import naming
from btx_merge.files.placing import MARKS

# The largest in use: a tokenizer.json of 17 MB (Llama 3), an index of a few MB, configs of some KB.
_MB = 1_000_000
_LIMITS = {
    "tokenizer.json": 64 * _MB,
    "tokenizer.model": 64 * _MB,
    "vocab.json": 64 * _MB,
    "merges.txt": 64 * _MB,
    "model.safetensors.index.json": 32 * _MB,
    "pytorch_model.bin.index.json": 32 * _MB,
}
_TEXT_LIMIT = 8 * _MB
"""Of configs, cards, templates and recipes."""
_OTHER_LIMIT = 1000 * _MB
"""Of what is only copied, such as a picture or a log."""
_TEXT_SUFFIXES = (".json", ".yaml", ".yml", ".md", ".jinja", ".py", ".txt", "")
_WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")

SAVE_AGAIN = "Save it again with save_pretrained, or download it again."
COPY_THE_REST = "Give another folder, or copy the missing file there."
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


@contextmanager
def opening(source: str, reference: str | Path) -> Iterator[None]:
    """Name a model as the source of all that keeps it from being opened inside.

    Args:
        source: the model's name.
        reference: what to name where the system does not say which file it was.

    Raises:
        InputError: a problem of a file of it; or the system refused, as for a folder that may not be entered.
    """
    try:
        yield
    except InputError as error:
        raise InputError(replace(problem, source=source) for problem in error.problems) from error
    except OSError as error:
        where, found = str(error.filename or reference), error.strerror or str(error)
        raise InputError([Problem(source, where, found, "files that can be read")]) from error


def is_plain_name(name: object) -> bool:
    """Return whether a name that a file brings can only mean a file in the same folder, on every system."""
    if not isinstance(name, str) or not name.isprintable() or name in ("", ".", ".."):
        return False  # half of a surrogate pair is not printable either
    return not set(name) & set('/\\:*?"<>|') and len(name.encode()) <= 255


def checked(file: Path, root: Path | None = None) -> Path:
    """Return a file of a model's folder if it may be read or copied.

    Args:
        root: the model's folder where that is not the file's own, as for `additional_chat_templates/tools.jinja`.

    Raises:
        InputError: the file is missing, cannot be reached, is a link that leads out of the folder (other than the
            Hub's cache has them), is no plain file, or is too large for its kind.
    """
    if problem := _problem(file, root or file.parent):
        raise InputError([problem])
    return file


def file_problems(folder: Path, names: Sequence[str]) -> Iterator[Problem]:
    """Find what is wrong with files of a folder, without reading them. A file that is not there is not wrong.

    Args:
        names: of the files; one with a `*` means all that match.
    """
    for name in names:
        for file in sorted(folder.glob(name)) if "*" in name else [folder / name]:
            if os.path.lexists(file) and (problem := _problem(file, folder)):
                yield problem


def read_bytes(file: Path, root: Path | None = None) -> bytes:
    """Return what a small file of a model's folder holds.

    Raises:
        InputError: as `checked`, or it cannot be read.
    """
    checked(file, root)
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError([_unreachable(file, error)]) from error


def read_text(file: Path) -> str:
    """Return the text of a small file of a model's folder.

    Raises:
        InputError: as `checked`, or it is no text in UTF-8.
    """
    try:
        return read_bytes(file).decode()
    except UnicodeDecodeError as error:
        found, remedy = f"is no UTF-8 ({error.reason} at byte {error.start:,})", "Save it as UTF-8."
        raise InputError([Problem(file.parent.name, str(file), found, "text in UTF-8", remedy)]) from error


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a small file of a model's folder.

    Raises:
        InputError: as `checked`, or it is no JSON (`bounded_json.parse_json`), or no object.
    """
    content = read_bytes(file)
    where = (file.parent.name, str(file))
    try:
        values = parse_json(content)
    except ValueError as error:
        raise InputError([Problem(*where, f"not JSON: {error}", "a JSON object", SAVE_AGAIN)]) from error
    if not isinstance(values, dict):
        raise InputError([Problem(*where, "not a JSON object", "one", SAVE_AGAIN)])
    return values


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object as all our JSON files are written.

    Raises:
        OSError: the disk refused.
    """
    with naming(file):
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_file(file: Path, target: Path, root: Path | None = None) -> None:
    """Copy a file of a model's folder to `target`; what it holds, not a link.

    Raises:
        InputError: as `checked`.
        OSError: the disk refused.
    """
    shutil.copyfile(checked(file, root), target)


def small_files(folder: Path) -> dict[str, Path]:
    """Return every file in a model's folder that is not weights, by name; hidden files and folders are passed over."""
    files = {}
    for file in sorted(folder.iterdir()):
        is_left_out = file.suffix in _WEIGHTS_SUFFIXES or file.name.startswith(".") or file.name in MARKS
        if not is_left_out and not file.is_dir():
            files[file.name] = file
    return files


def _problem(file: Path, root: Path) -> Problem | None:
    """Return what keeps a file from being read, if anything does."""
    where, remedy = (file.parent.name, str(file)), "Remove it, or put a plain file in its place."
    try:
        real, status = os.path.realpath(file), file.stat()
    except OSError as error:
        return _unreachable(file, error)
    if not _is_inside(Path(real), Path(os.path.realpath(root))):
        found = f"a link that leads out of the folder, to {real}"
        remedy = "Put a copy in its place if you want what it leads to; otherwise remove it."
        return Problem(*where, found, "a file of the folder", remedy)
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "a device")
        return Problem(*where, kind, "a plain file", remedy)
    limit = _limit(file)
    if limit is not None and status.st_size > limit:
        return Problem(*where, f"{status.st_size:,} bytes", f"at most {limit:,} in such a file", remedy)
    return None


def _unreachable(file: Path, error: OSError) -> Problem:
    where, found = (file.parent.name, str(file)), error.strerror or str(error)
    if isinstance(error, FileNotFoundError):
        if file.is_symlink():
            found = f"a link to {os.readlink(file)}, where nothing is"
            return Problem(*where, found, "a file of the folder", "Download or copy the missing file.")
        return Problem(*where, "missing", "a folder saved by save_pretrained", COPY_THE_REST)
    return Problem(*where, found, "a file that can be read")


def _is_inside(real: Path, root: Path) -> bool:
    """Return whether a file, all links followed, lies in a folder, or where the Hub's cache keeps that folder's files.

    There `models--org--name/snapshots/COMMIT/config.json` is a link to `models--org--name/blobs/HASH`.
    """
    if real.is_relative_to(root):
        return True
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots" and real.parent == folder.parent.parent / "blobs":
            return True
    return False


def _limit(file: Path) -> int | None:
    """Return how many bytes a file of this name may have; None for weights."""
    if file.suffix in _WEIGHTS_SUFFIXES:
        return None
    return _LIMITS.get(file.name, _TEXT_LIMIT if file.suffix in _TEXT_SUFFIXES else _OTHER_LIMIT)
