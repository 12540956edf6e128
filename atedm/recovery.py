"""Recovery: gives pruned positions a value again, so that convolutions can follow.

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
    """The inverse of one pruning. It maps the kept tokens, with their new values, to the token set before pruning.

    Restores nest: the last pruning is the first to be undone.
    """

    def __call__(self, tokens: TokenSet) -> TokenSet:
        """The token set before pruning. Raises ``ValueError`` unless ``tokens`` are those that the pruning kept."""


@dataclass(frozen=True, eq=False)
class Copy:
    """The restore that copies kept tokens to the pruned positions, by one gather.

    ``source`` (B, n) int64 gives each of the n tokens before pruning the index, among the ``kept_count`` kept ones, of
    the token that it copies. ``grid`` and ``positions`` are those of the set before pruning.
    """

    source: Tensor
    kept_count: int
    grid: tuple[int, int]
    positions: Tensor | None

    def __call__(self, tokens: TokenSet) -> TokenSet:
        """See :class:`Restore`."""
        check_kept(tokens, (self.source.shape[0], self.kept_count), self.grid)
        return TokenSet(take_tokens(tokens.values, self.source), self.grid, self.positions)


def recover(name: str, tokens: TokenSet, kept: Tensor, self_attention: LazyGraph) -> Restore:
    """The recovery called ``name``, one of ``RECOVERIES``.

    ``tokens`` is the set before pruning, ``kept`` (B, k) the ascending indices of the tokens that stay and
    ``self_attention`` the graph of ``tokens``. Raises ``ValueError`` for an unknown name.
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
    """The paper's recovery: a pruned token copies the kept token that attends to it most.

    For pruned token b that is the kept token i with the largest A[i, b], averaged over heads. Arguments as in
    :func:`recover`.
    """
    sources = _sources(tokens, kept, lambda pruned: graph.argmax_query(among=kept, targets=pruned).unsqueeze(-1))
    return Copy(sources[..., 0], kept.shape[1], tokens.grid, tokens.positions)


def nearest_copy(tokens: TokenSet, kept: Tensor) -> Copy:
    """A pruned token copies the kept token with the largest cosine similarity."""
    return Copy(nearest_kept(tokens, kept, 1)[..., 0], kept.shape[1], tokens.grid, tokens.positions)


def nearest_kept(tokens: TokenSet, kept: Tensor, count: int) -> Tensor:
    """For each token the ``count`` kept tokens of largest cosine similarity, as indices (B, n, count) into ``kept``.

    If fewer are kept, there are fewer. A kept token has its own index instead.
    """
    values = take_tokens(tokens.values, kept)
    return _sources(tokens, kept, lambda pruned: nearest(take_tokens(tokens.values, pruned), values, count)[1])


def _sources(tokens: TokenSet, kept: Tensor, find: Callable[[Tensor], Tensor]) -> Tensor:
    """Indices (B, n, m) into ``kept``: a kept token's own, and for the pruned ones what ``find`` returns.

    ``find`` maps indices (B, n - k) of pruned tokens to indices (B, n - k, m) into ``kept``.
    """
    batch, count = kept.shape
    is_pruned = torch.ones(batch, tokens.count, dtype=torch.int64, device=kept.device).scatter(1, kept, 0)
    pruned = is_pruned.argsort(dim=1, stable=True)[:, count:]
    found = find(pruned)
    own = torch.arange(count, device=kept.device)[None, :, None].expand(batch, -1, found.shape[-1])
    sources = found.new_empty(batch, tokens.count, found.shape[-1])
    return put_tokens(found, pruned, put_tokens(own, kept, sources))
