"""Generalized Weighted Page Rank (G-WPR): how important each token is, read off the attention graph.

Source: the AT-EDM paper, section 3.2, Algorithm 1 and equation (1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atedm.graph import AttentionGraph, DenseGraph

# The paper names a threshold epsilon and gives no number. Scores of a head sum to one, so this is a share of all votes.
EPSILON = 1e-5
MAX_ITERATIONS = 50

# Equation (1) divides by a row's entropy, which is 0 where a query attends to one key alone. float32 cannot tell rows
# under this many nats from such a row.
ENTROPY_FLOOR = 1e-6


@dataclass(frozen=True, eq=False)
class Ranking:
    """The outcome of G-WPR, head by head.

    ``heads`` (B, heads, M): scores that sum to one over each head's M queries. ``iterations`` (B, heads): how many each
    head took. ``converged`` (B, heads) bool: stopped because its scores no longer changed, not at the iteration limit.
    """

    heads: Tensor
    iterations: Tensor
    converged: Tensor

    @classmethod
    def join(cls, parts: Sequence[Ranking], batch: int, heads: int) -> Ranking:
        """The ranking whose heads are those of ``parts``, in order."""

        def joined(tensors: list[Tensor]) -> Tensor:
            all_heads = torch.cat([x.flatten(0, 1) for x in tensors])
            return all_heads.view(batch, heads, *all_heads.shape[1:])

        return cls(
            joined([part.heads for part in parts]),
            joined([part.iterations for part in parts]),
            joined([part.converged for part in parts]),
        )

    @property
    def scores(self) -> Tensor:
        """(B, M): root mean square over heads, which rewards tokens that a few heads rate very high (section 3.2)."""
        return self.heads.square().mean(dim=1).sqrt()


def rank(
    attention: Tensor | AttentionGraph,
    *,
    cross: bool = False,
    eps: float = EPSILON,
    max_iterations: int = MAX_ITERATIONS,
) -> Ranking:
    """Algorithm 1 on a map (B, heads, M, N) or a graph of it, for each head of each batch row by itself.

    ``cross`` says that queries and keys are different tokens, so that equation (1) must bring the scores of the keys
    back to the queries. A head stops when its scores change by at most ``eps`` (L1 norm), or after ``max_iterations``.
    Whether all heads have stopped is asked of the device in each iteration, unless ``eps`` is 0: then there are exactly
    ``max_iterations`` of them, nothing waits for the device, and the meta device and compiled graphs are fine as well.

    Raises ``ValueError`` for a map that is not row-stochastic (see :meth:`DenseGraph.from_map`), for self-attention
    with M != N, and for ``eps`` or ``max_iterations`` out of range.
    """
    graph = DenseGraph.from_map(attention) if isinstance(attention, Tensor) else attention
    _, _, queries, keys = graph.shape
    if not cross and queries != keys:
        raise ValueError(f"self-attention has {queries} queries and {keys} keys, expected as many; or cross=True")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, expected 0 or more")
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}, expected 1 or more")

    if cross:  # where keys are words, the map is small
        return _rank(graph, cross, eps, max_iterations)
    parts = [_rank(part, cross, eps, max_iterations) for part in graph.parts()]
    return Ranking.join(parts, *graph.shape[:2])


def _rank(graph: AttentionGraph, cross: bool, eps: float, max_iterations: int) -> Ranking:
    """The ranking of all heads of ``graph`` side by side."""
    entropy = graph.entropy().clamp_min(ENTROPY_FLOOR) if cross else None
    s_q = graph.uniform()
    iterations = torch.zeros(s_q.shape[:2], dtype=torch.int64, device=s_q.device)
    active = torch.ones_like(iterations, dtype=torch.bool)
    for _ in range(max_iterations):
        s_k = graph.rmatvec(s_q)
        update = s_k if entropy is None else graph.matvec(s_k) / entropy  # f(A, s_K)
        update = update / update.abs().sum(dim=-1, keepdim=True)
        change = (update - s_q).abs().sum(dim=-1)
        s_q = torch.where(active.unsqueeze(-1), update, s_q)
        iterations += active
        active &= ~(change <= eps)  # written so that NaN never counts as converged
        if eps > 0 and not active.any():  # the one wait for the device in each iteration
            break
    return Ranking(s_q, iterations, converged=~active)


def gwpr(
    attention: Tensor | AttentionGraph,
    *,
    cross: bool = False,
    eps: float = EPSILON,
    max_iterations: int = MAX_ITERATIONS,
) -> Tensor:
    """Importance of each query token, (B, M): the scores of :func:`rank`, which says more."""
    return rank(attention, cross=cross, eps=eps, max_iterations=max_iterations).scores
