"""The header of a safetensors file, checked against the file's size: where its tensors lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from btx_merge.checkpoints.dtypes import STORED
from btx_merge.checkpoints.stored import FETCH_AGAIN, MAX_HEADER, StoredTensor, checked_file, file_problem
from btx_merge.errors import InputError, Problem, capped
from btx_merge.files.bounded_json import parse_json

_MAX_BYTES = 2**63 - 1  # offsets in a file are signed, of 64 bits
_MAX_DIMENSIONS = 16  # no tensor of a Llama has more than 2; a shape of millions of ones would only cost time
_MAX_SHOWN = 200
"""Characters of a header's entry that an error repeats."""
# bytes of a value, by dtype, of those that a merge does not take but a file may hold
_WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"the key {key} stands there twice")
        seen[key] = value
    return seen


def read_safetensors(file: Path) -> dict[str, StoredTensor]:
    """Read from the header of a safetensors file where its tensors lie.

    Raises:
        InputError: the file is truncated, or its header is no JSON, names a tensor twice, or lies about
            offsets or shapes. All such problems of the file in one error.
    """
    size = checked_file(file).stat().st_size
    with file.open("rb") as handle:
        head = handle.read(8)  # the header's length
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, MAX_HEADER):
            found = f"{size:,} bytes, too few for the {length:,} bytes of header that it announces"
            if len(head) < 8:
                found = f"{size} bytes, not even a header"
            expected = "a safetensors file"
            if MAX_HEADER < length <= size - 8:
                found, expected = f"a header of {length:,} bytes", f"at most {MAX_HEADER:,}"
            raise InputError([file_problem(file, found, expected, FETCH_AGAIN)])
        try:
            header = parse_json(handle.read(length), object_pairs_hook=_refuse_duplicates)
            if not isinstance(header, dict):
                raise ValueError("it is no JSON object")
        except ValueError as error:
            remedy = "Save the checkpoint again with save_pretrained, or download it again."
            raise InputError([file_problem(file, f"unreadable header: {error}", "", remedy)]) from error
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
            found = f"the header's entry for {name} is malformed: {repr(entry)[:_MAX_SHOWN]}"
            problems.append(file_problem(file, found, "dtype, shape, data_offsets", FETCH_AGAIN))
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
    """Check that offsets follow each other without gap or overlap, fit the shapes, and end where the file ends."""
    problems: list[Problem] = []
    wrong_sizes: list[Problem] = []
    expected_start = data_start
    # Empty tensors share their start with the next one, so size decides the order between them.
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes)):
        width = STORED[tensor.dtype].itemsize if tensor.dtype in STORED else _WIDTHS.get(tensor.dtype)
        wanted = (_values_in(tensor.shape) or 0) * (width or 0)
        if width is not None and tensor.nbytes != wanted:
            found = f"the header gives {tensor.name} {tensor.nbytes:,} bytes"
            expected = f"{wanted:,} for shape {list(tensor.shape)} in {tensor.dtype}"
            wrong_sizes.append(file_problem(file, found, expected, FETCH_AGAIN))
        if tensor.start != expected_start:
            found = f"the header puts {tensor.name} at byte {tensor.start:,}"
            problems.append(file_problem(file, found, f"byte {expected_start:,}", FETCH_AGAIN))
        expected_start = tensor.start + tensor.nbytes
    problems = [*capped(wrong_sizes), *capped(problems)]
    if expected_start > size:
        problems.append(file_problem(file, f"truncated: {size:,} bytes", f"{expected_start:,}", FETCH_AGAIN))
    elif expected_start < size and not problems:
        found = f"{size - expected_start:,} bytes behind the last tensor"
        problems.append(file_problem(file, found, f"{expected_start:,} bytes in all", FETCH_AGAIN))
    return problems
