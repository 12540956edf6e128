"""Solutions of lesson 5."""

import math

from torch import Tensor

from atedm import Site


def exercise_5_1(steps: int, tau: int) -> int:
    """Rounding with halves up is the floor of one half more."""
    return math.floor(tau * steps / 50 + 0.5)


def exercise_5_2(sites: list[Site]) -> set[str]:
    """Later ones in the list replace earlier ones, so each stage goes through it from the end that it looks for."""
    in_order = sorted(sites, key=lambda site: site.index)
    first = {site.level: site.name for site in reversed(in_order) if site.stage == "down"}
    last = {site.level: site.name for site in in_order if site.stage == "up"}
    return {*first.values(), *last.values()}


def exercise_5_3(A: Tensor) -> Tensor:
    """The mean of N A is 1, because each row sums to 1."""
    return ((len(A) * A - 1) ** 2).mean()
