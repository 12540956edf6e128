"""Forecasts against polynomials that numpy fits, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from minisdxl.steps.forecast import Point, forecast
from minisdxl.steps.plan import FORECASTS

TIMES, SIGMAS = (0.0, 1.0, 4.0, 5.0, 7.0), (9.0, 7.0, 4.0, 3.0, 2.5)
AT, SIGMA = 9.0, 1.5


def path(seed: int = 0) -> tuple[list[Point], Tensor]:
    torch.manual_seed(seed)
    shape = (2, 3, 4, 5)
    points = [
        Point(time, sigma, torch.randn(shape).double(), torch.randn(shape).double(), True)
        for time, sigma in zip(TIMES, SIGMAS, strict=True)
    ]
    return points, torch.randn(shape).double()


def fitted(values: list[Tensor], degree: int, at: float = AT, where: tuple[float, ...] = TIMES) -> Tensor:
    """The polynomial of that degree through the last values, which lie at ``where``."""
    chosen = torch.stack(values[-1 - degree :]).flatten(1).numpy()
    powers = np.vander(where[-1 - degree :], degree + 1)
    coefficients = np.linalg.solve(powers, chosen)
    return torch.from_numpy(np.vander([at], degree + 1) @ coefficients).reshape(values[0].shape)


@pytest.mark.parametrize("name", [name for name in FORECASTS if name != "residual"])
def test_polynomials_equal_numpys(name: str) -> None:
    points, x = path()
    quantity, degree = name.split("-")
    if quantity == "noise":
        expected = fitted([point.noise for point in points], int(degree))
    else:
        axis = (SIGMA, SIGMAS) if quantity == "sigma" else (AT, TIMES)
        expected = (x - fitted([point.x - point.sigma * point.noise for point in points], int(degree), *axis)) / SIGMA
    error = float((forecast(name, points, AT, x, SIGMA) - expected).abs().max())
    print(f"{name}: error {error:.1e}")
    assert error < 1e-10


def test_residual_is_what_the_network_adds_to_its_input() -> None:
    points, x = path()
    last = points[-1]
    expected = x / (1 + SIGMA**2) ** 0.5 + last.noise - last.x / (1 + last.sigma**2) ** 0.5
    torch.testing.assert_close(forecast("residual", points, AT, x, SIGMA), expected, rtol=0, atol=1e-12)


def test_a_path_that_is_a_polynomial_is_followed_exactly() -> None:
    """What has degree 2 in the number of the step is forecast right by degrees 2 and above, and not by 1."""
    points = [
        Point(time, 1.0, torch.full((1, 1, 1, 1), time**2 + 3.0).double(), torch.zeros(1, 1, 1, 1).double(), True)
        for time in TIMES
    ]
    x = torch.zeros(1, 1, 1, 1).double()
    for degree, exact in ((1, False), (2, True), (3, True), (4, True)):
        found = float(-forecast(f"latent-{degree}", points, AT, x, 1.0)) - 3
        assert (abs(found - AT**2) < 1e-9) == exact


def test_rows_of_a_batch_do_not_mix() -> None:
    points, x = path()
    alone = [Point(p.time, p.sigma, p.x[1:], p.noise[1:], True) for p in points]
    for name in FORECASTS:
        both, one = forecast(name, points, AT, x, SIGMA), forecast(name, alone, AT, x[1:], SIGMA)
        assert torch.equal(both[1:], one), name


def test_too_few_evaluations() -> None:
    points, x = path()
    with pytest.raises(ValueError, match="forecast latent-4 has 2 evaluations, expected 5"):
        forecast("latent-4", points[:2], AT, x, SIGMA)
