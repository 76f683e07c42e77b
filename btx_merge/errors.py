"""The tree of errors that btx-merge raises on purpose.

BTXError
├── InputError        something the user gave is wrong; carries every problem found  (exit code 2)
└── MergeError        the work itself failed; what was there before is untouched     (exit code 1)
    ├── NonFiniteError    a NaN or an Inf was met while streaming
    └── MergeInterrupted  Ctrl-C; the same command run again continues
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from btx_merge.reporting import printable

_MANY = 4
"""Problems of one kind that are shown one by one: enough to see what they have in common."""

_MOST_PROBLEMS = 100
"""Lines of an error; a checkpoint can have thousands of tensors that are all wrong."""


class BTXError(Exception):
    """Base of every error that btx-merge raises on purpose."""


@dataclass(frozen=True)
class Problem:
    """One reason to refuse (or, as a warning, to look twice)."""

    source: str
    """The source's name (`seed`, `code`, ...), or the recipe's file."""
    where: str
    """The file, tensor or key."""
    found: str
    """What is there."""
    expected: str = ""
    """What should be there."""
    remedy: str = ""
    """What to do about it."""

    def __str__(self) -> str:
        text = f"{printable(self.source)}: {printable(self.where)}: {printable(self.found)}"
        if self.expected:
            text += f"; expected {printable(self.expected)}"
        return text + (f". {printable(self.remedy)}" if self.remedy else "")


def capped(problems: Sequence[Problem]) -> list[Problem]:
    """Return the first problems of one kind, and one more that counts the rest."""
    if len(problems) <= _MANY:
        return list(problems)
    last = problems[-1]
    return [*problems[:_MANY], replace(last, found=f"{len(problems) - _MANY:,} more like these", expected="none")]


class InputError(BTXError):
    """The input cannot be used. `problems` holds all that was found, not only the first."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = tuple(problems)
        super().__init__("\n".join(self.lines))

    @property
    def lines(self) -> list[str]:
        """One line for each problem; where there are very many, the first of them and how many more there are."""
        lines = [str(problem) for problem in self.problems[:_MOST_PROBLEMS]]
        more = len(self.problems) - len(lines)
        return [*lines, f"{more:,} more problems"] if more else lines


@contextmanager
def collecting(problems: list[Problem], source: str = "") -> Iterator[None]:
    """Go on behind a refusal inside: its problems join the others, so that all of them are told together.

    Args:
        source: whose they are, where what raises them does not know its name.
    """
    try:
        yield
    except InputError as error:
        problems += [replace(problem, source=source or problem.source) for problem in error.problems]


class MergeError(BTXError):
    """The merge could not be carried out."""

    def __str__(self) -> str:
        return printable(super().__str__())


class NonFiniteError(MergeError):
    """A source holds a NaN or an Inf, or a value left the range of the output's dtype."""


class MergeInterrupted(MergeError):
    """The merge was interrupted; what is finished is kept beside the output for the next run."""

    def __init__(
        self, text: str = "Interrupted. Nothing is lost: the same command continues where this one stopped."
    ) -> None:
        super().__init__(text)
