"""Solutions of lesson 4."""

import torch
from torch import Tensor


def exercise_4_1(scores: Tensor, rho: float) -> Tensor:
    """The best, as many as are kept, in reading order."""
    number = max(1, round(len(scores) * (1 - rho)))
    return scores.topk(number).indices.sort().values


def exercise_4_2(A: Tensor, kept: Tensor, pruned: Tensor) -> Tensor:
    """Row i of this part is a kept token, column b a pruned one."""
    return kept[A[kept][:, pruned].argmax(dim=0)]


def exercise_4_3(values: Tensor, kept: Tensor, source: Tensor) -> Tensor:
    """First every kept token at its position, then each token from its source."""
    everywhere = torch.zeros(len(source), values.shape[1], dtype=values.dtype)
    everywhere[kept] = values
    return everywhere[source]
