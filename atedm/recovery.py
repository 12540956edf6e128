"""Giving pruned positions a value again, so that convolutions can follow.

Source: the AT-EDM paper, section 3.2, "Recovering Pruned Tokens" and figure 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from atedm.cosine import nearest
from atedm.fills import add_change, bicubic_interpolation, check_kept, direct_copy, put_tokens, zero_padding
from atedm.graph import AttentionGraph, LazyGraph
from atedm.tokens import TokenSet, take_tokens

RECOVERIES = (
    *("similarity", "zeros", "bicubic", "direct"),  # those of the paper's figure 9
    *("similarity-change", "nearest", "nearest-change", "nearest-two-change"),
)


class Restore(Protocol):
    """The inverse of one pruning: takes the kept tokens, whatever their values are by then, to the set before it.

    Restores nest: last pruned, first restored.
    """

    def __call__(self, tokens: TokenSet) -> TokenSet:
        """The set before. Raises ``ValueError`` for tokens that are not the ones that this pruning kept."""


@dataclass(frozen=True, eq=False)
class Copy:
    """The restore that copies kept tokens.

    It gathers, so a per-token layer gives the same before it, on the kept tokens alone, as after it.
    ``source`` (B, n) int64 names for each of the n tokens before pruning the kept token whose value it takes, counted
    among the ``kept_count`` kept ones. ``positions`` and ``grid`` are those of the set before.
    """

    source: Tensor
    kept_count: int
    grid: tuple[int, int]
    positions: Tensor | None

    def __call__(self, tokens: TokenSet) -> TokenSet:
        """One gather, see :class:`Restore`."""
        check_kept(tokens, (self.source.shape[0], self.kept_count), self.grid)
        return TokenSet(take_tokens(tokens.values, self.source), self.grid, self.positions)


def recover(name: str, tokens: TokenSet, kept: Tensor, self_attention: LazyGraph) -> Restore:
    """The recovery called ``name``, one of ``RECOVERIES``, of ``kept`` (B, k), ascending indices among ``tokens``.

    ``tokens`` is the set before pruning, ``self_attention`` its graph. Raises ``ValueError`` for another name.
    """
    match name:
        case "similarity":
            return similarity_copy(tokens, self_attention.graph, kept)
        case "nearest":
            return nearest_copy(tokens, kept)
        case "similarity-change":
            return add_change(tokens, kept, similarity_copy(tokens, self_attention.graph, kept).source.unsqueeze(-1))
        case "nearest-change":
            return add_change(tokens, kept, nearest_kept(tokens, kept, 1))
        case "nearest-two-change":
            return add_change(tokens, kept, nearest_kept(tokens, kept, 2))
        case "zeros":
            return zero_padding(tokens, kept)
        case "bicubic":
            return bicubic_interpolation(tokens, kept)
        case "direct":
            return direct_copy(tokens, kept)
    raise ValueError(f"recovery is {name!r}, expected one of {', '.join(RECOVERIES)}")


def identity(tokens: TokenSet) -> Copy:
    """The inverse of a pruning that kept every token."""
    batch, count = tokens.values.shape[:2]
    source = torch.arange(count, device=tokens.values.device).expand(batch, -1)
    return Copy(source, count, tokens.grid, tokens.positions)


def similarity_copy(tokens: TokenSet, graph: AttentionGraph, kept: Tensor) -> Copy:
    """Each pruned token takes the value of the kept token that is most similar to it; kept ones take their own.

    The most similar kept token i of a pruned token b is the one with the largest A[i, b]: the attention that b
    receives, averaged over heads. ``tokens`` is the set before pruning, ``graph`` its self-attention, ``kept`` (B, k)
    the ascending indices of the tokens that stay.
    """
    sources = _sources(tokens, kept, lambda pruned: graph.argmax_query(among=kept, targets=pruned).unsqueeze(-1))
    return Copy(sources[..., 0], kept.shape[1], tokens.grid, tokens.positions)


def nearest_copy(tokens: TokenSet, kept: Tensor) -> Copy:
    """As :func:`similarity_copy`, but the most similar kept token is the one :func:`nearest` by its value."""
    return Copy(nearest_kept(tokens, kept, 1)[..., 0], kept.shape[1], tokens.grid, tokens.positions)


def nearest_kept(tokens: TokenSet, kept: Tensor, count: int) -> Tensor:
    """The ``count`` kept tokens :func:`nearest` to each, by value: places (B, n, count) among ``kept`` (B, k).

    Where k is less, there are k. A kept token has itself instead.
    """
    values = take_tokens(tokens.values, kept)
    return _sources(tokens, kept, lambda pruned: nearest(take_tokens(tokens.values, pruned), values, count)[1])


def _sources(tokens: TokenSet, kept: Tensor, find: Callable[[Tensor], Tensor]) -> Tensor:
    """Places among the kept tokens (B, n, m): its own for a kept one, and for the pruned ones what ``find`` gives.

    That maps indices (B, n - k) among ``tokens`` to places (B, n - k, m).
    """
    batch, count = kept.shape
    is_pruned = torch.ones(batch, tokens.count, dtype=torch.int64, device=kept.device).scatter(1, kept, 0)
    pruned = is_pruned.argsort(dim=1, stable=True)[:, count:]
    found = find(pruned)
    own = torch.arange(count, device=kept.device)[None, :, None].expand(batch, -1, found.shape[-1])
    places = found.new_empty(batch, tokens.count, found.shape[-1])
    return put_tokens(found, pruned, put_tokens(own, kept, places))
