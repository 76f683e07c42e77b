"""Token by token, the text that tokens stand for, made fit to be shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from btx_merge.reporting import printable

_BYTES = 4
"""Of a character in UTF-8, at most; no more tokens than that are parts of one."""
_SHOWN = "\n\t\u3000"
"""White space that is shown as it is. Other letters that cannot be seen are written as escapes."""


def words_of(ids: Sequence[int], tokenizer: Any) -> list[str]:
    r"""Return the text of each token, as `shown`; together they are the text of all.

    A token is decoded behind the one before it, for some tokenizers leave out a blank at the beginning. Of a character
    that several tokens make up, the last one has it all; the others are empty.

    Example: where the tokens 5 6 stand for the two halves of "é" and 7 for " x", `words_of([5, 6, 7], tokenizer)` is
    `["", "é", " x"]`.
    """
    words: list[str] = []
    begin = done = 0  # what follows is decoded from `begin` on; before `done` all is given out
    for end in range(1, len(ids) + 1):
        before, text = (tokenizer.decode(ids[begin:stop], clean_up_tokenization_spaces=False) for stop in (done, end))
        is_part = text.endswith("\ufffd") and end - done < _BYTES
        if len(text) <= len(before) or is_part:
            words.append("")
            continue
        words.append(shown(text[len(before) :]))
        begin, done = done, end
    return words


def shown(text: str) -> str:
    r"""Return text as it can be shown: what cannot be seen, or turns the direction of writing, as escapes.

    >>> shown("a\x1b\u202e\n")
    'a\\x1b\\u202e\n'
    """
    return "".join(letter if letter in _SHOWN else printable(letter) for letter in text)
