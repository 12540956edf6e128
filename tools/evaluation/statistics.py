"""Mean and covariance of features as they come in parts: merged, they are those of the whole.

A part holds R with R^T R = sum of (x - mean)(x - mean)^T, from a QR decomposition, instead of that sum: merging parts
stacks their R and decomposes again, which loses no digits to squaring (Chan, Golub and LeVeque 1983 for the shift of
means; Demmel et al. 2012, "Communication-optimal parallel and sequential QR", for the stacking).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Of ``count`` features: their ``mean`` (D,) and ``factor`` R (k, D) of their scatter; all in float64."""

    count: int
    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """Of features (n, D). Raises ``ValueError`` for none."""
        if features.ndim != 2 or not len(features):
            raise ValueError(f"features are {tuple(features.shape)}, expected (n, D) with 1 or more rows")
        mean = features.double().mean(dim=0)
        return cls(len(features), mean, torch.linalg.qr(features.double() - mean, mode="r").R)

    def merge(self, other: Statistics) -> Statistics:
        """Of the features of both. Raises ``ValueError`` for another D."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features have {len(other.mean)} numbers, expected {len(self.mean)}")
        count = self.count + other.count
        shift = other.mean - self.mean
        between = math.sqrt(self.count * other.count / count) * shift  # the scatter of the two means
        stacked = torch.cat([self.factor, other.factor, between[None]])
        return Statistics(count, self.mean + shift * (other.count / count), torch.linalg.qr(stacked, mode="r").R)

    def covariance(self) -> Tensor:
        """(D, D), unbiased. Raises ``ZeroDivisionError`` for one feature, which has none."""
        return self.factor.T @ self.factor / (self.count - 1)


def distance(features: Statistics, reference: Statistics) -> float:
    """Squared Fréchet distance of two normal distributions.

    |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2)): Dowson and Landau 1982, and for pictures Heusel et al. 2017. With
    few samples it is too large, by an amount that depends on n and m. So compare only distances of equal n and m.
    Raises ``ValueError`` for fewer than 2 samples and for unequal D.
    """
    shapes = [(each.count, len(each.mean)) for each in (features, reference)]
    if min(features.count, reference.count) < 2 or shapes[0][1:] != shapes[1][1:]:
        raise ValueError(f"features are {shapes[0]} and {shapes[1]}, expected 2 or more rows, equally long")
    factors = [each.factor / math.sqrt(each.count - 1) for each in (features, reference)]
    # tr (C C')^(1/2) is the sum of the singular values of R R'^T, exact also for covariances without full rank.
    shared = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    spread = factors[0].square().sum() + factors[1].square().sum() - 2 * shared
    return float((features.mean - reference.mean).square().sum() + spread)
