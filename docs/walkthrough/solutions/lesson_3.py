"""Solutions of lesson 3."""

from torch import Tensor


def exercise_3_1(A: Tensor, s: Tensor) -> Tensor:
    """Each query votes for the keys, with its own score as the weight."""
    s_K = A.T @ s
    return s_K / s_K.abs().sum()


def exercise_3_2(A: Tensor, s_K: Tensor) -> Tensor:
    """Attention to important keys, over the entropy of the row."""
    entropy = -(A * A.log()).sum(dim=1)
    return (A @ s_K) / entropy


# Tokens 2 and 3 give all they have to token 0, but nobody votes for them, so that their votes soon count nothing. Token
# 0 passes what it has to token 1, which keeps most of it.
exercise_3_3 = [
    [0.1, 0.9, 0.0, 0.0],
    [0.0, 0.9, 0.05, 0.05],
    [1.0, 0.0, 0.0, 0.0],
    [1.0, 0.0, 0.0, 0.0],
]
