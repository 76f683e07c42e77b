"""Conversion between stored numbers and float32, in numpy.

The merge needs nothing of torch for this, and an import of torch costs more memory than the whole merge.
bfloat16 is the upper half of a float32, so both directions are integer operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Raw = NDArray[np.uint8]
Float32 = NDArray[np.float32]

STORED: dict[str, np.dtype] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
"""The dtypes a source may have: safetensors' name, and how numpy holds it (bfloat16 as its bits)."""
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""safetensors' name to torch's, which config.json and the recipe use."""
SAFETENSORS_NAMES = {torch: name for name, torch in TORCH_NAMES.items()}

# All bits of the exponent set: Inf and NaN. Seen as integers they lie above every finite value,
# and their negatives above every finite negative one.
_EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


def config_dtype(config: Mapping[str, Any]) -> Any:
    """Return what a config.json says of the weights' dtype, as transformers 5 writes it, or 4; None for nothing."""
    return config.get("dtype") or config.get("torch_dtype")


def to_float32(raw: Raw, dtype: str) -> Float32:
    """Convert flat bytes of `dtype` to a flat float32 array of its own. Exact for every stored dtype."""
    values = raw.view(STORED[dtype])
    if dtype == "BF16":
        shifted: NDArray[np.uint32] = np.left_shift(values, 16, dtype=np.uint32)
        return shifted.view(np.float32)
    return values.astype(np.float32)


def from_float32(values: Float32, dtype: str) -> Raw:
    """Convert a contiguous float32 array to flat bytes of `dtype`, rounded once, to nearest even (as torch rounds)."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if dtype == "F16":
        with np.errstate(over="ignore"):  # an overflow becomes Inf, which the writer finds and reports
            return flat.astype(np.float16).view(np.uint8)
    if dtype == "F32":
        return flat.view(np.uint8)
    bits = flat.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1  # the last bit that stays: ties go to even
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    out = rounded.astype(np.uint16)
    nan = np.isnan(flat)
    if nan.any():  # the carry above could turn a NaN into an Inf or a zero
        out[nan] = 0x7FC0
    return out.view(np.uint8)


def all_finite(raw: Raw, dtype: str) -> bool:
    """Return whether flat bytes of `dtype` hold neither NaN nor Inf. Memory is read twice, nothing is converted."""
    if raw.size == 0:
        return True
    width = STORED[dtype].itemsize
    exponent = _EXPONENT[dtype]
    sign = 1 << (8 * width - 1)
    signed = raw.view(f"<i{width}")
    unsigned = raw.view(f"<u{width}")
    return bool(signed.max() < exponent and unsigned.max() < (exponent | sign))
