"""Sinusoidal embedding of numbers: timesteps, and the size numbers of SDXL's micro-conditioning."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoidal_embedding(values: Tensor, channels: int) -> Tensor:
    """Cosines, then sines, of ``values`` at ``channels // 2`` frequencies from 1 down to just above 1 / 10000.

    Official: ``timestep_embedding`` with ``max_period`` 10000, channel i has frequency 10000^(-i / half).

    Args:
        values: (B,), of any number type.
        channels: width of the embedding, even.

    Returns:
        (B, channels), float64 where ``values`` are, float32 otherwise: half precision cannot tell index 998 from 999.

    Raises:
        ValueError: for ``values`` of another shape, or a ``channels`` that is odd or not positive.
    """
    if values.ndim != 1:
        raise ValueError(f"values to embed have shape {tuple(values.shape)}, expected (B,)")
    if channels < 2 or channels % 2:
        raise ValueError(f"embedding has {channels} channels, expected an even number, 2 or more")
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    half = channels // 2
    indices = torch.arange(half, dtype=dtype, device=values.device)
    frequencies = torch.exp(-math.log(10000) * indices / half)  # in the official order: it decides the last bits
    angles = values.to(dtype)[:, None] * frequencies  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
