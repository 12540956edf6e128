"""Generalized Weighted Page Rank (G-WPR): how important each token is, read off the attention graph.

Source: the AT-EDM paper, section 3.2, Algorithm 1 and equation (1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atedm.coverage import SHIFTS, cover, grid_order
from atedm.graph import AttentionGraph, LazyGraph
from atedm.held import HeldGraph
from atedm.similarity import dissimilarity
from atedm.tokens import TokenSet

RANKINGS = ("gwpr", "ca-wpr", "one-vote", "lowest", "random", "grid", "moving-grid", "covered", "dissimilarity")

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

    Raises ``ValueError`` for a map that is not row-stochastic (see :meth:`HeldGraph.from_map`), for self-attention
    with M != N, and for ``eps`` or ``max_iterations`` out of range.
    """
    graph = HeldGraph.from_map(attention) if isinstance(attention, Tensor) else attention
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
        s_k = graph.votes(s_q)
        update = s_k if entropy is None else graph.gather(s_k) / entropy  # f(A, s_K)
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


def scores(
    name: str,
    tokens: TokenSet,
    self_attention: LazyGraph,
    cross_attention: LazyGraph,
    iterations: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Importance (B, n) of each of ``tokens`` by the ranking called ``name``, one of ``RANKINGS``.

    ``gwpr`` and ``ca-wpr`` are G-WPR on self-attention and on cross-attention to the text, until it settles, or for
    exactly ``iterations`` (see :func:`rank`). ``one-vote`` is its first iteration on self-attention: how much attention
    a token receives. ``lowest`` turns ``gwpr`` around. ``random`` draws scores from ``seed``, on any device the same
    and for each batch row the same. ``grid`` keeps a regular grid, ``moving-grid`` one that is moved by ``seed``, and
    ``covered`` first the best of ``gwpr`` in each window, see :mod:`atedm.coverage`; ``dissimilarity`` keeps what is
    unlike the rest, see :mod:`atedm.similarity`.
    No graph is built but the one that is read. Raises ``ValueError`` for another name.
    """
    eps, limit = (EPSILON, MAX_ITERATIONS) if iterations is None else (0.0, iterations)
    match name:
        case "gwpr":
            return gwpr(self_attention.graph, eps=eps, max_iterations=limit)
        case "ca-wpr":
            return gwpr(cross_attention.graph, cross=True, eps=eps, max_iterations=limit)
        case "one-vote":
            return gwpr(self_attention.graph, eps=0.0, max_iterations=1)
        case "lowest":
            return -gwpr(self_attention.graph, eps=eps, max_iterations=limit)
        case "random":
            drawn = torch.rand(tokens.count, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
            return drawn.to(tokens.values.device).expand(tokens.values.shape[0], -1)
        case "grid":
            return grid_order(tokens)
        case "moving-grid":
            return grid_order(tokens, seed % len(SHIFTS))
        case "covered":
            return cover(gwpr(self_attention.graph, eps=eps, max_iterations=limit), tokens)
        case "dissimilarity":
            return dissimilarity(tokens)
    raise ValueError(f"ranking is {name!r}, expected one of {', '.join(RANKINGS)}")


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices (B, k), ascending, of the k highest of ``scores`` (B, N). On ties the lower position wins.

    Raises ``ValueError`` unless 1 <= k <= N.
    """
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k is {k}, expected 1 to {scores.shape[-1]}, the number of tokens")
    best_first = scores.sort(dim=-1, descending=True, stable=True).indices
    return best_first[..., :k].sort(dim=-1).values


def kept_count(n: int, ratio: float) -> int:
    """How many of ``n`` tokens pruning with ``ratio`` (rho) keeps: round(n * (1 - rho)), at least 1.

    A half rounds to the even number (Python's ``round``). Raises ``ValueError`` for a ratio outside [0, 1).
    """
    check_ratio(ratio)
    return max(1, round(n * (1 - ratio)))


def check_ratio(ratio: float) -> None:
    """Raise ``ValueError`` unless ``ratio`` is a share of tokens that can be removed."""
    if not 0 <= ratio < 1:
        raise ValueError(f"pruning ratio rho is {ratio}, expected 0 <= rho < 1")
