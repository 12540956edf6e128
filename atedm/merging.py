"""Token merging (ToMe): similar tokens are averaged before a sub-layer, and its output is copied back to each of them.

Source: Bolya and Hoffman 2023, "Token Merging for Fast Stable Diffusion", and their code, tomesd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from atedm.cosine import nearest
from atedm.reduction import Merge, Reduction, check_dense
from atedm.tokens import TokenSet, take_tokens


@dataclass(frozen=True, eq=False)
class Matching(Merge):
    """Which of the n tokens are merged into which of the m that stay; r = n - m.

    ``order`` (B, n) are token indices: the m that stay, destinations last, then the r others, most similar first.
    ``target`` (B, r) says into which of the m each of these others is merged. ``source`` (B, n) says for each token, in
    the original order, which of the m merged tokens it is part of.
    """

    order: Tensor
    target: Tensor
    source: Tensor

    def merge(self, values: Tensor) -> Tensor:
        """Each destination becomes the mean of itself and of the tokens merged into it, see :class:`Merge`."""
        ordered = take_tokens(values, self.order)
        stay, go = ordered.tensor_split([values.shape[1] - self.target.shape[1]], dim=1)
        return stay.scatter_reduce(1, self.target.unsqueeze(-1).expand_as(go), go, reduce="mean", include_self=True)

    def unmerge(self, values: Tensor) -> Tensor:
        """One gather, see :class:`Merge`."""
        return take_tokens(values, self.source)


@dataclass(frozen=True)
class Merging(Reduction):
    """How a transformer layer merges its tokens. The ratio is the share of tokens that are merged into others.

    Raises ``ValueError`` for a stride below 1 and a ratio outside 0 to 1 - 1 / (cell size).
    """

    self_attention: bool = True  # around which sub-layers
    cross_attention: bool = True
    feed_forward: bool = True
    stride: tuple[int, int] = (2, 2)  # rows and columns of a cell; each cell has one destination

    def __post_init__(self) -> None:
        if min(self.stride) < 1:
            raise ValueError(f"merging stride is {self.stride}, expected 1 or more each")
        if not 0 <= self.ratio <= self.most:
            raise ValueError(
                f"merging ratio r is {self.ratio}, expected 0 to {self.most:.4g} with stride {self.stride}"
            )

    @property
    def most(self) -> float:
        """All but the destinations."""
        return 1 - 1 / math.prod(self.stride)

    def match(self, tokens: TokenSet) -> tuple[Merge, Merge, Merge]:
        """The merges around self-attention, cross-attention and feed-forward, all by one matching.

        ``tokens`` are what enters the layer, before any norm. Raises ``ValueError`` as :func:`match_tokens` does.
        """
        matching = match_tokens(tokens, self) if any(self._where) else Merge()
        around_self, around_cross, around_feed = (matching if merged else Merge() for merged in self._where)
        return around_self, around_cross, around_feed

    def counts(self, grid: tuple[int, int]) -> tuple[int, int, int, int]:
        """See :class:`Reduction`."""
        count = math.prod(grid)
        fewer = count - self.removed(count)
        in_self, in_cross, in_feed = (fewer if merged else count for merged in self._where)
        return in_self, in_self, in_cross, in_feed

    def flops(self, grid: tuple[int, int], channels: int) -> int:
        """Of the similarities of every source to every destination."""
        count, (height, width), (rows, columns) = math.prod(grid), grid, self.stride
        destinations = (height // rows) * (width // columns)
        matches = any(self._where) and self.removed(count) > 0
        return 2 * (count - destinations) * channels * destinations if matches else 0

    def removed(self, count: int) -> int:
        """How many of ``count`` tokens are merged into others: int(count * ratio), rounded as tomesd does."""
        return int(count * self.ratio)

    @property
    def _where(self) -> tuple[bool, bool, bool]:
        return self.self_attention, self.cross_attention, self.feed_forward


def match_tokens(tokens: TokenSet, how: Merging) -> Merge:
    """Bipartite soft matching of the tokens of a grid.

    The first token of each whole cell is a destination, all others are sources. The sources with the largest cosine
    similarity to a destination, as many as ``how`` removes, are merged into it. Similarity is computed in float32 at
    least. Raises ``ValueError`` for sparse tokens or a grid smaller than a cell.

    This is tomesd's ``bipartite_soft_matching_random2d`` without randomness, bit for bit, except for the order of
    destinations and the choice among equal similarities. tomesd leaves both to an unstable sort; here the first token
    comes first.
    """
    removed = how.removed(tokens.count)
    if not removed:
        return Merge()
    check_dense(tokens)
    destinations, sources = _split(tokens.grid, how.stride, tokens.values.device)
    found = nearest(tokens.values[:, sources], tokens.values[:, destinations])
    best, like = (each.squeeze(-1) for each in found)
    ranked = best.sort(dim=-1, descending=True, stable=True).indices
    go, stay = ranked[:, :removed], ranked[:, removed:]

    order = torch.cat([sources[stay], destinations.expand(len(stay), -1), sources[go]], dim=1)
    target = like.gather(1, go) + stay.shape[1]
    own = torch.arange(tokens.count - removed, device=target.device).expand(len(stay), -1)
    source = torch.empty_like(order).scatter(1, order, torch.cat([own, target], dim=1))
    return Matching(order, target, source)


def _split(grid: tuple[int, int], stride: tuple[int, int], device: torch.device) -> tuple[Tensor, ...]:
    """Raster positions of destinations and of sources, ascending."""
    (height, width), (rows, columns) = grid, stride
    down, across = height // rows, width // columns
    if down * across == 0:
        raise ValueError(f"grid {grid} is smaller than a merging cell {stride}: no token is a destination")
    is_source = torch.ones(grid, dtype=torch.int64, device=device)
    is_source[: down * rows : rows, : across * columns : columns] = 0
    return is_source.flatten().argsort(stable=True).tensor_split([down * across])
