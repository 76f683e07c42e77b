"""Where every tensor of a checkpoint file lies: safetensors and torch's own format, read without their data.

Both formats end up as `StoredTensor`: a range of bytes in a file. The rest of the package knows no formats.
A file is never trusted: what its header promises is held against its size, and every error names the file.
"""

from __future__ import annotations

import struct
import threading
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from btx_merge.checkpoints.dtypes import STORED, TORCH_NAMES, Raw
from btx_merge.checkpoints.page_cache import forget_range, was_cached
from btx_merge.errors import InputError, Problem, capped
from btx_merge.files.bounded_json import parse_json
from btx_merge.files.disk_errors import naming
from btx_merge.files.folder import checked

_MAX_HEADER = 25_000_000
"""Bytes of a header, or of the pickle that is one in torch's format. A hundred thousand tensors need 15 MB."""
_MAX_BYTES = 2**63 - 1
_MAX_DIMENSIONS = 16
_MAX_SHOWN = 200
"""Characters of a header's entry that an error repeats."""
_WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as it lies in a file: row-major, `nbytes` bytes from `start`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is of one index of the first dimension."""
        return self.nbytes // max(1, self.shape[0]) if self.shape else self.nbytes

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Where its bytes lie in the file: first byte and number of each run."""
        return ((self.start, self.nbytes),)

    def read_rows(self, start: int, stop: int) -> Raw:
        """Rows [start, stop) as flat bytes, in a buffer of this thread that its next read overwrites.

        Fresh memory for every block would cost more than reading it.
        """
        first, nbytes = self.start + start * self.row_bytes, (stop - start) * self.row_bytes
        if nbytes > getattr(_buffers, "raw", _NOTHING).size:
            _buffers.raw = np.empty(nbytes, np.uint8)
        out: Raw = _buffers.raw[:nbytes]
        with naming(self.file), self.file.open("rb", buffering=0) as file:
            file.seek(first)
            filled = 0
            while filled < nbytes:
                got = file.readinto(out.data[filled:])
                if not got:
                    raise InputError([_problem(self.file, f"ends inside tensor {self.name}", "", _FETCH_AGAIN)])
                filled += got
            if not was_cached(self.file):
                forget_range(file.fileno(), first, nbytes)
        return out


_buffers = threading.local()
_NOTHING = np.empty(0, np.uint8)
_SAVE_AGAIN = "Save it as safetensors: load it in transformers and call save_pretrained."
_FETCH_AGAIN = "Download or copy the file again."


def _problem(file: Path, found: str, expected: str = "", remedy: str = "") -> Problem:
    return Problem(file.parent.name, file.name, found, expected, remedy)


def _checked(file: Path) -> Path:
    try:
        return checked(file)
    except InputError as error:
        raise InputError(replace(problem, where=file.name) for problem in error.problems) from error


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"the key {key} stands there twice")
        seen[key] = value
    return seen


def read_safetensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, from its header.

    Raises:
        InputError: the file is truncated, or its header is no JSON, names a tensor twice, or lies about
            offsets or shapes. All such problems of the file in one error.
    """
    size = _checked(file).stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, _MAX_HEADER):
            found = f"{size:,} bytes, too few for the {length:,} bytes of header that it announces"
            if len(head) < 8:
                found = f"{size} bytes, not even a header"
            expected = "a safetensors file"
            if _MAX_HEADER < length <= size - 8:
                found, expected = f"a header of {length:,} bytes", f"at most {_MAX_HEADER:,}"
            raise InputError([_problem(file, found, expected, _FETCH_AGAIN)])
        try:
            header = parse_json(stream.read(length), object_pairs_hook=_refuse_duplicates)
            if not isinstance(header, dict):
                raise ValueError("it is no JSON object")
        except ValueError as error:
            remedy = "Save the checkpoint again with save_pretrained, or download it again."
            raise InputError([_problem(file, f"unreadable header: {error}", "", remedy)]) from error
    header.pop("__metadata__", None)
    problems, tensors = [], {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = (*shape, begin, end)
            if not all(type(number) is int and number >= 0 for number in numbers):  # True is no number here
                raise ValueError
            if not isinstance(dtype, str) or begin > end or end > _MAX_BYTES:
                raise ValueError
            if len(shape) > _MAX_DIMENSIONS or _values_in(shape) is None:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            found, expected = (
                f"the header's entry for {name} is malformed: {repr(entry)[:_MAX_SHOWN]}",
                "dtype, shape, data_offsets",
            )
            problems.append(_problem(file, found, expected, _FETCH_AGAIN))
            continue
        tensors[name] = StoredTensor(name, file, dtype, shape, 8 + length + begin, end - begin)
    if problems := [*capped(problems), *_layout_problems(file, size, 8 + length, list(tensors.values()))]:
        raise InputError(problems)
    return tensors


def _values_in(shape: tuple[int, ...]) -> int | None:
    """Return how many values a tensor of this shape has; None where no file could hold them."""
    product = 1
    for number in shape:
        if number > _MAX_BYTES or (product := product * number) > _MAX_BYTES:
            return None
    return product


def _layout_problems(file: Path, size: int, data_start: int, tensors: list[StoredTensor]) -> list[Problem]:
    """Offsets must follow each other without gap or overlap, fit the shapes, and end where the file ends."""
    problems: list[Problem] = []
    wrong_sizes: list[Problem] = []
    expected_start = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes)):
        width = STORED[tensor.dtype].itemsize if tensor.dtype in STORED else _WIDTHS.get(tensor.dtype)
        wanted = (_values_in(tensor.shape) or 0) * (width or 0)
        if width is not None and tensor.nbytes != wanted:
            found = f"the header gives {tensor.name} {tensor.nbytes:,} bytes"
            expected = f"{wanted:,} for shape {list(tensor.shape)} in {tensor.dtype}"
            wrong_sizes.append(_problem(file, found, expected, _FETCH_AGAIN))
        if tensor.start != expected_start:
            found = f"the header puts {tensor.name} at byte {tensor.start:,}"
            problems.append(_problem(file, found, f"byte {expected_start:,}", _FETCH_AGAIN))
        expected_start = tensor.start + tensor.nbytes
    problems = [*capped(wrong_sizes), *capped(problems)]
    if expected_start > size:
        problems.append(_problem(file, f"truncated: {size:,} bytes", f"{expected_start:,}", _FETCH_AGAIN))
    elif expected_start < size and not problems:
        found = f"{size - expected_start:,} bytes behind the last tensor"
        problems.append(_problem(file, found, f"{expected_start:,} bytes in all", _FETCH_AGAIN))
    return problems


def read_torch(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a `pytorch_model.bin` or `adapter_model.bin`, as ranges of the zip file that it is.

    torch's restricted unpickler (`weights_only`) reads the index under fake tensors: no code of the file
    runs, no data is loaded.

    Raises:
        InputError: not torch's zip format, something else than plain tensors in it, or truncated.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    names = {getattr(torch, torch_name): name for name, torch_name in TORCH_NAMES.items()}
    records = _uncompressed_records(_checked(file))
    try:
        with FakeTensorMode():
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a bad file; each means the same to us
        first_line = str(error).strip().split("\n")[0]
        problem = _problem(file, f"torch cannot read it with weights_only ({first_line})", "", _SAVE_AGAIN)
        raise InputError([problem]) from error
    problems: list[Problem] = []
    tensors: dict[str, StoredTensor] = {}
    if not isinstance(loaded, dict):
        raise InputError([_problem(file, f"holds a {type(loaded).__name__}", "names and tensors", _SAVE_AGAIN)])
    for name, tensor in loaded.items():
        if not isinstance(tensor, torch.Tensor) or not isinstance(name, str):
            kind = "tensor" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            found = f"{name!r} is a {kind}"
            problems.append(_problem(file, found, "names and tensors", _SAVE_AGAIN))
            continue
        storage = tensor.untyped_storage() if tensor.layout == torch.strided else None
        offset = getattr(storage, "_checkpoint_offset", None)
        if storage is None or offset is None or not tensor.is_contiguous():
            found = f"{name} does not lie in one piece (old format, or a transposed view)"
            problems.append(_problem(file, found, "", _SAVE_AGAIN))
            continue
        if records.get(offset) != storage.nbytes():
            found = f"{name} takes {storage.nbytes():,} bytes, which do not lie plainly in the file"
            problems.append(_problem(file, found, "", _SAVE_AGAIN))
        dtype = names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        start = offset + tensor.storage_offset() * tensor.element_size()
        nbytes = tensor.numel() * tensor.element_size()
        tensors[name] = StoredTensor(name, file, dtype, tuple(tensor.shape), start, nbytes)
    if problems:
        raise InputError(problems)
    return tensors


def _uncompressed_records(file: Path) -> dict[int, int]:
    """Return where each member of the zip file that is not compressed begins, and its size; nothing of another format.

    Raises:
        InputError: big-endian numbers, at which torch would crash under fake tensors; members besides the tensors'
            data that would fill the memory; a zip file that is broken.
    """
    out: dict[int, int] = {}
    if not zipfile.is_zipfile(file):
        return out
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            for member in archive.infolist():
                if "/data/" not in member.filename and member.file_size > _MAX_HEADER:
                    found = f"{member.filename} announces {member.file_size:,} bytes"
                    raise InputError([_problem(file, found, f"at most {_MAX_HEADER:,}", _SAVE_AGAIN)])
                if member.filename.endswith("/byteorder") and archive.open(member).read(16) != b"little":
                    raise InputError([_problem(file, "its numbers are big-endian", "little-endian", _SAVE_AGAIN)])
                stream.seek(member.header_offset + 26)  # the lengths of the name and of the extra field behind it
                name_length, extra_length = struct.unpack("<HH", stream.read(4))
                if member.compress_type == zipfile.ZIP_STORED:
                    out[member.header_offset + 30 + name_length + extra_length] = member.file_size
    except InputError:
        raise
    except Exception as error:  # zipfile and its decompressors raise many kinds; each means the same to us
        reason = str(error) or type(error).__name__
        raise InputError([_problem(file, f"a broken zip file ({reason})", "", _FETCH_AGAIN)]) from error
    return out


def read_tensor_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint file of either format."""
    try:
        return read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
    except OSError as error:
        raise InputError([_problem(file, error.strerror or str(error), "a file that can be read")]) from error


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint's safetensors files, by its name.

    Raises:
        InputError: a file that cannot be read.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= read_tensor_file(file)
    return tensors
