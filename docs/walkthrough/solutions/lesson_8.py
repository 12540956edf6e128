"""Solutions of lesson 8."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tools.evaluation.paired_statistics import bootstrap_mean


def exercise_8_1(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Squared differences between rows and between columns, each given to both of its tokens."""
    x = values.view(*grid, -1)
    below = (x[1:] - x[:-1]).square().mean(dim=-1)
    right = (x[:, 1:] - x[:, :-1]).square().mean(dim=-1)
    total, neighbors = torch.zeros(grid, dtype=values.dtype), torch.zeros(grid, dtype=values.dtype)
    total[:-1] += below
    total[1:] += below
    total[:, :-1] += right
    total[:, 1:] += right
    neighbors[:-1] += 1
    neighbors[1:] += 1
    neighbors[:, :-1] += 1
    neighbors[:, 1:] += 1
    return (total / neighbors).flatten()


def exercise_8_2(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Lower errors are better, so an interval below 0 is."""
    difference = bootstrap_mean([a - b for a, b in zip(ours, theirs, strict=True)])
    return "better" if difference.high < 0 else "worse" if difference.low > 0 else "undecided"


def exercise_8_3(step: int) -> float:
    """In a line from 0.28 to 0.85. The ends were tried until the average fitted."""
    return 0.28 + 0.57 * step / 49
