"""Rankings: scores that say which tokens matter, by name, and the choice of the tokens that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm.cosine import dissimilarity
from atedm.coverage import SHIFTS, cover, grid_order
from atedm.graph import LazyGraph
from atedm.gwpr import EPSILON, MAX_ITERATIONS, gwpr
from atedm.tokens import TokenSet

RANKINGS = ("gwpr", "ca-wpr", "one-vote", "lowest", "random", "grid", "moving-grid", "covered", "dissimilarity")


def scores(
    name: str,
    tokens: TokenSet,
    self_attention: LazyGraph,
    cross_attention: LazyGraph,
    iterations: int | None = None,
    seed: int = 0,
) -> Tensor:
    """The score (B, n) of each of ``tokens`` by the ranking ``name``. High scores stay.

    - ``gwpr``, ``ca-wpr``: G-WPR on self-attention, or on cross-attention to the text. It runs until it converges, or
      for exactly ``iterations`` (:func:`~atedm.gwpr.rank`).
    - ``one-vote``: the attention that a token receives, which is the first iteration of ``gwpr``.
    - ``lowest``: minus ``gwpr``.
    - ``random``: drawn from ``seed``, the same on every device and for every batch row.
    - ``grid``, ``moving-grid``: a regular grid, which ``seed`` shifts in the second (:mod:`atedm.coverage`).
    - ``covered``: the best of ``gwpr`` in each window first (:mod:`atedm.coverage`).
    - ``dissimilarity``: tokens that are least similar to the others first (:mod:`atedm.cosine`).

    Only the attention graph that the ranking reads is built. Raises ``ValueError`` for an unknown name.
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
    """Indices (B, k), ascending, of the k highest ``scores`` (B, N). Among equal scores the lowest index wins.

    Raises ``ValueError`` unless 1 <= k <= N.
    """
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k is {k}, expected 1 to {scores.shape[-1]}, the number of tokens")
    best_first = scores.sort(dim=-1, descending=True, stable=True).indices
    return best_first[..., :k].sort(dim=-1).values


def kept_count(n: int, ratio: float) -> int:
    """Number of tokens that pruning with ``ratio`` (rho) keeps of ``n``: round(n * (1 - rho)), at least 1.

    Halves are rounded to even, as Python's ``round`` does. Raises ``ValueError`` for a ratio outside [0, 1).
    """
    check_ratio(ratio)
    return max(1, round(n * (1 - ratio)))


def check_ratio(ratio: float) -> None:
    """Raises ``ValueError`` for a ratio outside [0, 1)."""
    if not 0 <= ratio < 1:
        raise ValueError(f"pruning ratio rho is {ratio}, expected 0 <= rho < 1")
