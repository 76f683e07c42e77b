"""JSON from files that nobody vouches for: whatever is wrong with it is a `ValueError`, and no number is endless."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

_MAX_DIGITS = 40
"""More than any size has. Python converts longer numbers slowly, and none of more than 4,300 digits to text."""

_Pairs = Callable[[list[tuple[str, Any]]], Any]


def parse_json(content: str | bytes, object_pairs_hook: _Pairs | None = None) -> Any:
    """Return the value that JSON text holds.

    Raises:
        ValueError: the text is no JSON or no UTF-8, too deeply nested, or holds a number of more than 40 digits or
            half of a surrogate pair, which no file in UTF-8 can hold.
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    try:
        values = json.loads(text, parse_int=_whole_number, object_pairs_hook=object_pairs_hook)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error
    if "\\ud" in text.lower():  # only an escape can bring half of a pair: the text itself is UTF-8
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"\\u{ord(half):04x} is half of a surrogate pair, which is no character") from error
    return values


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)
