"""Rankings of tokens by name, and which tokens a pruning keeps."""

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
    """Importance (B, n) of each of ``tokens`` by the ranking called ``name``, one of ``RANKINGS``.

    ``gwpr`` and ``ca-wpr`` are G-WPR on self-attention and on cross-attention to the text, until it settles, or for
    exactly ``iterations`` (see :func:`rank`). ``one-vote`` is its first iteration on self-attention: how much attention
    a token receives. ``lowest`` turns ``gwpr`` around. ``random`` draws scores from ``seed``, on any device the same
    and for each batch row the same. ``grid`` keeps a regular grid, ``moving-grid`` one that is moved by ``seed``, and
    ``covered`` first the best of ``gwpr`` in each window, see :mod:`atedm.coverage`; ``dissimilarity`` keeps what is
    unlike the rest, see :mod:`atedm.cosine`.
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
