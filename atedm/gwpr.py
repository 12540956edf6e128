"""Generalized Weighted Page Rank (G-WPR): the importance of each token, by power iteration on the attention map.

Source: the AT-EDM paper, section 3.2, Algorithm 1 and equation (1). There query i votes for key j with weight A[i, j].
Shapes: an attention map is (B, heads, M, N) for M queries and N keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atedm.graph import AttentionGraph, DenseGraph

# The paper's threshold epsilon, for which it gives no number. The scores of a head sum to one.
EPSILON = 1e-5
MAX_ITERATIONS = 50

# Equation (1) divides by a row's entropy, which is 0 where a query attends to one key alone. float32 cannot tell a row
# of less than this many nats from such a row.
ENTROPY_FLOOR = 1e-6


class Ranking(NamedTuple):
    """The result of G-WPR for each head.

    ``heads`` (B, heads, M) are scores that sum to one over the M queries. ``iterations`` (B, heads) counts iterations.
    ``converged`` (B, heads) is false where a head stopped at the iteration limit.
    """

    heads: Tensor
    iterations: Tensor
    converged: Tensor

    @classmethod
    def join(cls, parts: Sequence[Ranking], batch: int, heads: int) -> Ranking:
        """One ranking of (batch, heads) from those of a few heads each, in that order."""
        fields = (torch.cat([x.flatten(0, 1) for x in each]) for each in zip(*parts, strict=True))
        return cls(*(x.view(batch, heads, *x.shape[1:]) for x in fields))

    @property
    def scores(self) -> Tensor:
        """(B, M), the root mean square over heads. It favors tokens that a few heads score very high (section 3.2)."""
        return self.heads.square().mean(dim=1).sqrt()


def rank(
    attention: Tensor | AttentionGraph,
    *,
    cross: bool = False,
    eps: float = EPSILON,
    max_iterations: int = MAX_ITERATIONS,
) -> Ranking:
    """Algorithm 1 on a map (B, heads, M, N) or on its graph, independently for each head.

    ``cross`` is for cross-attention: equation (1) then maps the scores of the keys back to the queries. A head stops
    when its scores change by at most ``eps`` (L1 norm), or after ``max_iterations``. With ``eps`` 0 it runs exactly
    ``max_iterations``: the host never waits for the device, so that this also compiles and runs on the meta device.

    Raises ``ValueError`` for a map that is not row-stochastic (:meth:`DenseGraph.from_map`), for self-attention with
    M != N, and for ``eps`` or ``max_iterations`` out of range.
    """
    graph = DenseGraph.from_map(attention) if isinstance(attention, Tensor) else attention
    _, _, queries, keys = graph.shape
    if not cross and queries != keys:
        raise ValueError(f"self-attention has {queries} queries and {keys} keys, expected as many; or cross=True")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, expected 0 or more")
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}, expected 1 or more")

    if cross:  # a map to a few words is small
        return _rank(graph, cross, eps, max_iterations)
    parts = [_rank(part, cross, eps, max_iterations) for part in graph.parts()]
    return Ranking.join(parts, *graph.shape[:2])


def _rank(graph: AttentionGraph, cross: bool, eps: float, max_iterations: int) -> Ranking:
    """The power iteration, on all heads of ``graph`` at once."""
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
    """The scores (B, M) of the query tokens, by :func:`rank`."""
    return rank(attention, cross=cross, eps=eps, max_iterations=max_iterations).scores
