"""Algorithm 1 of the AT-EDM paper (G-WPR) in loops over plain Python numbers, which are float64."""

from __future__ import annotations

import math

from atedm.gwpr import EPSILON, MAX_ITERATIONS

Map = list[list[float]]  # the attention map of one head: row i has the weights of query i


def algorithm_1(
    a: Map, cross: bool = False, eps: float = EPSILON, limit: int = MAX_ITERATIONS
) -> tuple[list[float], int]:
    """The paper's listing for one head, line by line: scores of the queries, and the iterations that it took.

    A negative ``eps`` runs exactly ``limit`` iterations.
    """
    queries, keys = range(len(a)), range(len(a[0]))
    s_q = [1 / len(a)] * len(a)
    t = 0
    while True:
        s_k = [sum(a[i][j] * s_q[i] for i in queries) for j in keys]
        if cross:  # equation (1)
            entropy = [-sum(a[i][j] * math.log(a[i][j]) for j in keys) for i in queries]
            new = [sum(a[i][j] * s_k[j] for j in keys) / entropy[i] for i in queries]
        else:
            new = s_k
        total = sum(abs(s) for s in new)
        new = [s / total for s in new]
        change = sum(abs(x - y) for x, y in zip(new, s_q, strict=True))
        s_q, t = new, t + 1
        if change <= eps or t == limit:
            return s_q, t


def root_mean_square(heads: list[list[float]]) -> list[float]:
    """The scores of each token over all heads (section 3.2)."""
    return [math.sqrt(sum(s * s for s in token) / len(heads)) for token in zip(*heads, strict=True)]
