"""Numbers of bytes as a person reads them."""

from __future__ import annotations


def readable(nbytes: int) -> str:
    """Return a number of bytes in the largest unit that leaves a digit before the point.

    >>> readable(8_400_000)
    '8.40 MB'
    """
    for unit, name in ((1_000_000_000, "GB"), (1_000_000, "MB"), (1000, "KB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes} bytes"
