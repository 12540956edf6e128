"""Forecasts of the U-Net's prediction from earlier evaluations, by polynomials.

In the symbols of ``sampler``: x is the latent at noise level sigma, x = x_0 + sigma * noise. The name of a forecast
says what is followed, and in what: the noise in the number of the step ("noise-1"), the denoised latent x_0 in the
number of the step ("latent-3"), or x_0 in sigma ("sigma-1"). The polynomial of that degree goes through as many
evaluations and one more. Degree 0 takes the last one again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Point:
    """A call of the denoiser: ``x`` (B, C, H, W) at ``sigma``, and the guided prediction ``noise`` in it."""

    time: float  # the number of the step
    sigma: float
    x: Tensor
    noise: Tensor
    evaluated: bool  # or forecast

    @property
    def latent(self) -> Tensor:
        """The denoised latent."""
        return self.x - self.sigma * self.noise


def scaled(x: Tensor, sigma: float) -> Tensor:
    """What a network sees that predicts noise: c_in x (EDM, table 1)."""
    return x / math.sqrt(sigma**2 + 1)


def forecast(name: str, past: Sequence[Point], time: float, x: Tensor, sigma: float) -> Tensor:
    """The noise (B, C, H, W) in ``x`` at ``sigma``, by the forecast of that name, from ``past`` evaluations.

    Raises ``ValueError`` if there are too few of them.
    """
    if name == "residual":  # what the network adds to its input, EasyCache (arXiv:2507.02860)
        last = past[-1]
        return scaled(x, sigma) + last.noise - scaled(last.x, last.sigma)
    quantity, _, degree = name.partition("-")
    points = past[-1 - int(degree) :]
    if len(points) <= int(degree):
        raise ValueError(f"forecast {name} has {len(points)} evaluations, expected {int(degree) + 1}")
    if quantity == "sigma":
        weights = lagrange([point.sigma for point in points], sigma)
    else:
        weights = lagrange([point.time for point in points], time)
    if quantity == "noise":
        return _sum(weights, [point.noise for point in points])
    return (x - _sum(weights, [point.latent for point in points])) / sigma


def lagrange(times: Sequence[float], time: float) -> list[float]:
    """The weight of the value at each of ``times`` in the polynomial through all of them, at ``time``."""
    return [math.prod((time - other) / (own - other) for other in times if other != own) for own in times]


def _sum(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    terms = (weight * value for weight, value in zip(weights, values, strict=True))
    return sum(terms, start=torch.zeros_like(values[0]))  # one after the other: rounds the same in any batch
