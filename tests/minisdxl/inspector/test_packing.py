"""Packed numbers: read back here as the page's script does, with nothing of the packing code."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from atedm import top_k
from minisdxl.inspector.packing import bits, ranked, scaled, whole


def unpacked(packed: dict[str, Any], kind: str, last: int) -> NDArray[np.float64]:
    steps = np.frombuffer(base64.b64decode(packed["data"]), kind).astype(np.float64)
    low, high = packed["low"], packed["high"]
    return low * (high / low) ** (steps / last) if packed["log"] else low + (high - low) * steps / last


def test_bits_are_read_lowest_first() -> None:
    mask = np.array([1, 0, 0, 1, 0, 0, 0, 0, 1], dtype=bool)
    assert base64.b64decode(bits(mask)) == bytes([0b1001, 0b1])


def test_whole_numbers_are_16_bits_and_refuse_more() -> None:
    assert base64.b64decode(whole(np.array([1, 258, 65535]))) == bytes([1, 0, 2, 1, 255, 255])
    with pytest.raises(ValueError, match="values go from -1 to 65536, expected 0 to 65535"):
        whole(np.array([-1, 65536]))


@pytest.mark.parametrize(("low", "high"), [(1e-6, 1.0), (0.0, 3.0), (-4.0, -1.0)])
def test_scaled_values_come_back_within_half_a_step(low: float, high: float) -> None:
    values = np.random.default_rng(0).uniform(low, high, 1000)
    packed = scaled(values)
    found = unpacked(packed, "u1", 255)
    if packed["log"]:
        error, bound = np.abs(np.log(found / values)).max(), np.log(packed["high"] / packed["low"]) / 510
    else:
        error, bound = np.abs(found - values).max(), (packed["high"] - packed["low"]) / 510
    print(f"max error {error:.2e} of {bound:.2e}")
    assert error <= bound * (1 + 1e-9)


def test_equal_values_and_no_values_are_packed() -> None:
    assert (unpacked(scaled(np.full(3, 0.25)), "u1", 255) == 0.25).all()
    assert scaled(np.empty(0))["data"] == ""


@settings(max_examples=40)
@given(st.lists(st.sampled_from([0.0, 1e-9, 0.1, 0.1 + 1e-12, 2.0, 3.0]), min_size=1, max_size=40))
def test_ranks_of_scores_are_those_of_top_k(values: list[float]) -> None:
    """Also where scores are equal, or closer than a step."""
    import torch

    steps = np.frombuffer(base64.b64decode(ranked(np.array(values))["data"]), "<u2").astype(int)
    best_first = sorted(range(len(values)), key=lambda i: -steps[i])
    assert len(set(steps)) == len(values)
    for k in range(1, len(values) + 1):
        assert sorted(best_first[:k]) == top_k(torch.tensor([values], dtype=torch.float64), k)[0].tolist()


@pytest.mark.parametrize("count", [4096, 65536])
def test_scores_come_back_close(count: int) -> None:
    values = np.exp(np.random.default_rng(0).normal(size=count))
    found = unpacked(ranked(values), "<u2", 65535)
    error = np.abs(np.log(found / values)).max()
    print(f"{count} scores, max relative error {error:.2e}")
    assert error < (1e-3 if count == 4096 else 10)  # 65,536 different steps leave no freedom: only ranks are exact
    assert (np.argsort(found) == np.argsort(values)).all()
