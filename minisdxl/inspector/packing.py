"""Numbers as text for a page: base64 of bits, of 8 or of 16 bits each, lowest byte first.

Scores and weights become whole numbers between their ends, spaced evenly or, if all are positive, by ratio. A packed
array is a JSON object with ``data`` and, where it needs them, ``low``, ``high`` and ``log``.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

Packed = dict[str, Any]


def text(raw: bytes) -> str:
    """Base64."""
    return base64.b64encode(raw).decode("ascii")


def bits(mask: NDArray[np.bool_]) -> str:
    """One bit for each entry, lowest bit of a byte first."""
    return text(np.packbits(mask, bitorder="little").tobytes())


def whole(values: NDArray[np.int64]) -> str:
    """16 bits for each entry. Raises ``ValueError`` for one outside 0 to 65535."""
    if values.size and not 0 <= values.min() <= values.max() <= 0xFFFF:
        raise ValueError(f"values go from {values.min()} to {values.max()}, expected 0 to {0xFFFF}")
    return text(values.astype("<u2").tobytes())


def scaled(values: NDArray[np.float64]) -> Packed:
    """8 bits for each entry."""
    steps, ends = _steps(values, 0xFF)
    return {"data": text(steps.round().astype(np.uint8).tobytes()), **ends}


def ranked(values: NDArray[np.float64]) -> Packed:
    """16 bits for each of up to 65,536 entries, all different, in the order of ``values``.

    Of equal values the first is largest, as in :func:`atedm.ranking.top_k`. So ranks can be read from them exactly.
    """
    steps, ends = _steps(values, 0xFFFF)
    order = np.argsort(-values, kind="stable")[::-1]  # ascending, the first of equal ones last
    number = np.arange(len(values))
    apart = np.maximum.accumulate(steps[order].round().astype(np.int64) - number) + number
    apart = np.minimum(apart, 0xFFFF - number[::-1])
    codes = np.empty(len(values), dtype=np.int64)
    codes[order] = apart
    return {"data": whole(codes), **ends}


def _steps(values: NDArray[np.float64], last: int) -> tuple[NDArray[np.float64], Packed]:
    """Values as steps from 0 to ``last`` between their ends."""
    if not values.size:
        return values, {"low": 0.0, "high": 0.0, "log": False}
    low, high = float(values.min()), float(values.max())
    log = low > 0
    ends = {"low": low, "high": high, "log": log}
    if low == high:
        return np.zeros_like(values), ends
    if log:
        return np.log(values / low) * (last / np.log(high / low)), ends
    return (values - low) * (last / (high - low)), ends
