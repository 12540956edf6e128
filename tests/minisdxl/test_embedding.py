"""The sinusoidal embedding against diffusers' and against its definition, number by number."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from minisdxl.embedding import sinusoidal_embedding


@pytest.mark.parametrize("channels", [2, 32, 256, 320])
def test_parity_with_diffusers(channels: int) -> None:
    values = torch.tensor([0.0, 1.0, 37.0, 256.0, 999.0, 4096.0])
    peer = get_timestep_embedding(values, channels, flip_sin_to_cos=True, downscale_freq_shift=0)
    error = (sinusoidal_embedding(values, channels) - peer).abs().max().item()
    print(f"{channels} channels: max error {error:.2e}")
    assert error <= 1e-6


def test_definition_in_float64() -> None:
    values, channels = torch.tensor([0.0, 3.0, 0.5, 999.0], dtype=torch.float64), 64
    embedded = sinusoidal_embedding(values, channels)
    error = 0.0
    for row, value in zip(embedded.tolist(), values.tolist(), strict=True):
        for index in range(32):
            angle = value / 10000 ** (index / 32)
            error = max(error, abs(row[index] - math.cos(angle)), abs(row[32 + index] - math.sin(angle)))
    print(f"max error {error:.2e}")
    assert embedded.dtype == torch.float64 and error <= 1e-12


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16, torch.float32])
def test_computes_in_float32(dtype: torch.dtype) -> None:
    values = torch.tensor([1, 2, 128], dtype=dtype)
    embedded = sinusoidal_embedding(values, 32)
    assert embedded.dtype == torch.float32
    assert torch.equal(embedded, sinusoidal_embedding(values.float(), 32))


def test_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 6\), expected \(B,\)"):
        sinusoidal_embedding(torch.zeros(2, 6), 32)
    for channels in (0, 33):
        with pytest.raises(ValueError, match=f"{channels} channels, expected an even number"):
            sinusoidal_embedding(torch.zeros(2), channels)
