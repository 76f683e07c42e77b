"""Pictures that are composed, but painted only where a test looks at them.

To paint the picture of a tiny training takes three times as long as the training. A picture that is not painted is
composed all the same, with all its curves and words, and its file is written. The processes that tests start paint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

from matplotlib.figure import Figure

_paint = Figure.savefig


def _leave_out(figure: Figure, file: Path, **_: Any) -> None:
    assert figure.axes
    file.write_bytes(b"not painted: see tests/support/pictures.py")


def unpainted() -> Any:
    return patch.object(Figure, "savefig", _leave_out)


def painted() -> Any:
    return patch.object(Figure, "savefig", _paint)
