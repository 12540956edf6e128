"""Solutions of lesson 1."""

from torch import Tensor


def exercise_1_1(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The slope dx/dsigma, times a step that is negative."""
    return x + (sigma_next - sigma) * (x - denoised) / sigma


def exercise_1_2(u: Tensor, c: Tensor, scale: float) -> Tensor:
    """From u towards c, and past it where the scale is above 1."""
    return u + scale * (c - u)


# 8 x 8 pixels of 3 numbers each become one position of 4 numbers.
exercise_1_3 = 8 * 8 * 3 / 4
