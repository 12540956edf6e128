"""Statistics of parts, merged, against those of the whole in float64, and the distance against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from tools.evaluation.metrics import frechet_distance
from tools.evaluation.statistics import Statistics, distance


def features(count: int, width: int, seed: int) -> torch.Tensor:
    """Correlated features far from 0, where sums of squares would lose digits."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=generator, dtype=torch.float64) @ torch.randn(
        width, width, generator=generator, dtype=torch.float64
    )
    return mixed + 1000


@pytest.mark.parametrize("sizes", [[100], [1, 1, 98], [7, 50, 3, 40], [20] * 5])
def test_parts_are_the_whole(sizes: list[int]) -> None:
    whole = features(100, 12, 0)
    starts = [sum(sizes[:at]) for at in range(len(sizes))]
    merged, *others = [Statistics.of(whole[at : at + size]) for at, size in zip(starts, sizes, strict=True)]
    for other in others:
        merged = merged.merge(other)
    mean, covariance = whole.numpy().mean(axis=0), np.cov(whole.numpy().T)
    error = max(
        float((merged.mean - torch.from_numpy(mean)).abs().max() / 1000),
        float((merged.covariance() - torch.from_numpy(covariance)).abs().max() / np.abs(covariance).max()),
    )
    print(f"{sizes}: relative error {error:.1e}")
    assert merged.count == 100
    assert error < 1e-12
    other = Statistics.of(features(60, 12, 1))
    assert distance(merged, other) == pytest.approx(distance(Statistics.of(whole), other), rel=1e-10)


def test_the_distance_is_that_of_scipy() -> None:
    x, y = features(80, 10, 2), features(90, 10, 3)
    first, second = np.cov(x.numpy().T), np.cov(y.numpy().T)
    means = np.square(x.mean(0).numpy() - y.mean(0).numpy()).sum()
    expected = means + np.trace(first + second - 2 * sqrtm(first @ second).real)
    found = distance(Statistics.of(x), Statistics.of(y))
    print(f"{found} by factors, {expected} by scipy")
    assert found == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(x, y) == found


def test_fewer_pictures_than_features() -> None:
    """As in a part of 500 pictures with 2,048 features: covariances without full rank."""
    whole, reference = features(9, 30, 4), Statistics.of(features(11, 30, 5))
    merged = Statistics.of(whole[:4]).merge(Statistics.of(whole[4:]))
    assert distance(merged, reference) == pytest.approx(distance(Statistics.of(whole), reference), rel=1e-10)


def test_what_has_no_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match=r"features are \(0, 3\), expected"):
        Statistics.of(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="features have 4 numbers, expected 3"):
        Statistics.of(torch.zeros(2, 3)).merge(Statistics.of(torch.zeros(2, 4)))
    with pytest.raises(ValueError, match=r"features are \(1, 3\) and \(2, 3\), expected 2 or more rows"):
        distance(Statistics.of(torch.zeros(1, 3)), Statistics.of(torch.zeros(2, 3)))
