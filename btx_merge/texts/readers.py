"""Readers for records of text in files and datasets, one after the other: memory does not grow with a file.

Every record knows where it stood, so that an error can say so. (A `.json` file is the exception: it is read whole.)
"""

from __future__ import annotations

import codecs
import csv
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from btx_merge.errors import InputError, Problem
from btx_merge.reporting import first_line

EXTRA = "pip install '.[train]' in a checkout of btx-merge"
_WHOLE = 4_000_000
"""Bytes of a text file that is one document; characters after which a larger one is cut even inside a paragraph."""
_PART = 1_000_000
"""Characters after which a larger one is cut at the next empty line."""
_FIELDS = ("text", "content", "messages")
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
"""What a file in UTF-16 or UTF-32 begins with. (The mark of UTF-32 LE begins like that of UTF-16 LE.)"""


@dataclass(frozen=True)
class Record:
    """One record, and where it stands."""

    source: str
    where: str
    values: Mapping[str, Any]

    def refused(self, found: str, expected: str = "", remedy: str = "") -> InputError:
        """Return the error that names this record."""
        return InputError([Problem(self.source, self.where, found, expected, remedy)])

    def readable(self, text: str) -> str:
        """Return a text of this record.

        Raises:
            InputError: escapes of JSON have made half of a character in it, which no tokenizer reads.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}, half of a surrogate pair, which is no character"
            raise self.refused(half, "text", "Repair or remove the record.") from error
        return text


def suffix_of(file: Path) -> str:
    """Return the suffix that decides how a file is read."""
    return file.suffix.lower()


def is_installed(package: str) -> bool:
    """Return whether a package could be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def missing_packages(*needed: str) -> list[Problem]:
    """Return which of these packages, all of the extra `train`, are not installed."""
    missing = [package for package in needed if not is_installed(package)]
    return [Problem("command", package, "is not installed", "", f"{EXTRA}.") for package in missing]


def read_file(source: str, file: Path) -> Iterator[Record]:
    """Read the records of a file.

    Raises:
        InputError: the file or one of its lines cannot be read.
    """
    try:
        if suffix_of(file) != ".parquet":
            _refuse_wide(source, file)
        yield from READERS[suffix_of(file)](source, file)
    except UnicodeDecodeError as error:
        found = f"the byte 0x{error.object[error.start]:02x}, which is no UTF-8"
        raise InputError([Problem(source, str(file), found, "text in UTF-8", "Convert the file.")]) from error
    except OSError as error:
        raise InputError([Problem(source, str(file), error.strerror or str(error))]) from error


def read_hub(source: str, reference: str) -> Iterator[Record]:
    """Stream the records of the split `train` of a dataset on the Hub, `org/name[/config][@revision]`.

    Raises:
        InputError: the dataset cannot be read.
    """
    import datasets

    path, _, revision = reference.partition("@")
    organisation, name, *config = path.split("/")
    try:
        records: Iterable[Any] = datasets.load_dataset(
            f"{organisation}/{name}", *config, split="train", streaming=True, revision=revision or None
        )
        for number, values in enumerate(records, 1):
            yield Record(source, f"{reference}, record {number}", values)
    except InputError:
        raise
    except Exception as error:  # of datasets, huggingface_hub, httpx, fsspec and pyarrow
        found = f"cannot be read ({type(error).__name__}: {first_line(error)})"
        remedy = "Check the name (a config stands behind it: org/name/config), the network, or give files."
        raise InputError([Problem(source, reference, found, "a dataset of the Hub", remedy)]) from error


def _refuse_wide(source: str, file: Path) -> None:
    """Refuse UTF-16 and UTF-32, by their mark or by the zero bytes that letters of UTF-8 never have.

    Raises:
        InputError: the file is in one of them.
    """
    with file.open("rb") as handle:
        head = handle.read(4)
    if head.startswith(_WIDE) or b"\0" in head:
        remedy = "Convert the file: `iconv -f UTF-16 -t UTF-8 FILE > NEW_FILE`."
        raise InputError([Problem(source, str(file), "text in UTF-16 or UTF-32", "text in UTF-8", remedy)])


def _text(source: str, file: Path) -> Iterator[Record]:
    """Read plain text as it is, line ends included; only the mark that Windows' editors begin it with goes."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if file.stat().st_size <= _WHOLE:
            yield Record(source, str(file), {"text": lines.read()})
            return
        for part in _paragraphs(lines):
            yield Record(source, str(file), {"text": part})


def _paragraphs(lines: IO[str]) -> Iterator[str]:
    part: list[str] = []
    chars = 0
    while line := lines.readline(_PART):  # a line without an end comes in pieces, too
        part.append(line)
        chars += len(line)
        if chars >= _WHOLE or (chars >= _PART and not line.strip()):
            yield "".join(part)
            part, chars = [], 0
    yield "".join(part)


def _json_lines(source: str, file: Path) -> Iterator[Record]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                found = f"no JSON ({str(error) or type(error).__name__})"
                remedy = "Repair or remove the line."
                raise InputError([Problem(source, where, found, "one JSON object", remedy)]) from error
            yield _record(source, where, values)


def _json(source: str, file: Path) -> Iterator[Record]:
    try:
        values = json.loads(file.read_bytes().removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError) as error:
        found = f"no JSON ({str(error) or type(error).__name__})"
        remedy = "A file with one object on each line is called .jsonl."
        raise InputError([Problem(source, str(file), found, "a list of records", remedy)]) from error
    for number, item in enumerate(values if isinstance(values, list) else [values], 1):
        yield _record(source, f"{file}, record {number}", item)


def _csv(source: str, file: Path) -> Iterator[Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # csv's own, of 128 KB, is too small for a document
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines, strict=True)  # a quote that nothing closes would take all that follows
        try:
            for values in rows:
                yield Record(source, f"{file}, line {rows.line_num}", values)
        except csv.Error as error:
            raise InputError([Problem(source, f"{file}, after line {rows.line_num}", f"no CSV ({error})")]) from error


def _parquet(source: str, file: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            wanted = next(([name] for name in _FIELDS if name in names), names)
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=wanted):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(source, f"{file}, row {number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's
        found = f"no Parquet ({first_line(error)})"
        raise InputError([Problem(source, str(file), found, "", "Write or download it again.")]) from error


def _record(source: str, where: str, values: Any) -> Record:
    """Make a record from JSON; a string stands for its text."""
    record = Record(source, where, {"text": values} if isinstance(values, str) else values)
    if not isinstance(record.values, Mapping):
        raise record.refused(f"a {type(values).__name__}", "a JSON object or a string")
    return record


READERS: dict[str, Callable[[str, Path], Iterator[Record]]] = {
    ".txt": _text,
    ".md": _text,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""By suffix, in lower case."""
