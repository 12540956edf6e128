"""ToMA (token merge with attention): within tiles, tokens are merged into a few destinations by soft assignment.

Source: Lu, Zheng, Xia and Wang, ICML 2025, "ToMA: Token Merge with Attention for Diffusion Models", arXiv:2509.10918,
and their code. Merging and unmerging are matrix products. The paper uses a pattern again over layers and steps; here
every layer makes its own.

Shapes: T tiles of s tokens with m destinations each; grids whose sides are not a multiple have up to four tile sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from atedm.reduction import Merge, Reduction, check_dense, check_number
from atedm.tokens import TokenSet, at_least_float32

# Two tokens that are each other's nearest often add the same: 1 - a + c - b, and 1 - b + c - a. Rounding, which differs
# between devices and sizes of a batch, must not choose between them.
TIE = 1e-5


class Span(NamedTuple):
    """Neighbouring tiles of one size, along one side of the grid."""

    start: int
    tiles: int
    size: int


class Region(NamedTuple):
    """A rectangle of equal tiles."""

    rows: Span
    columns: Span

    @property
    def tiles(self) -> int:
        """T."""
        return self.rows.tiles * self.columns.tiles

    @property
    def tokens(self) -> int:
        """s, of each tile."""
        return self.rows.size * self.columns.size

    def split(self, values: Tensor, grid: tuple[int, int]) -> Tensor:
        """The tiles (B, T, s, C) of the dense values (B, N, C) of a ``grid``."""
        (top, down, height), (left, across, width) = self
        x = rearrange(values, "b (h w) c -> b h w c", h=grid[0])
        x = x[:, top : top + down * height, left : left + across * width]
        return rearrange(x, "b (y h) (x w) c -> b (y x) (h w) c", y=down, x=across)

    def join(self, tiles: Tensor) -> Tensor:
        """The inverse of :meth:`split` on this rectangle of the grid: (B, T, s, C) to (B, rows, columns, C)."""
        return rearrange(tiles, "b (y x) (h w) c -> b (y h) (x w) c", y=self.rows.tiles, h=self.rows.size)


@dataclass(frozen=True, eq=False)
class Assignment(Merge):
    """How much of each token goes to each destination of its tile.

    ``shares`` are A (B, T, m, s) for each of ``regions``, which are in raster order. Each token's shares sum to 1.
    ``chosen`` (B, T, m) says which of a tile's tokens are its destinations.
    """

    grid: tuple[int, int]
    regions: tuple[Region, ...]
    shares: tuple[Tensor, ...]
    chosen: tuple[Tensor, ...]

    def merge(self, values: Tensor) -> Tensor:
        """Destinations are means weighted by A: the product with A, each row divided by its sum. See :class:`Merge`."""
        parts = zip(self.regions, self.shares, strict=True)
        merged = (
            (a / a.sum(-1, keepdim=True)).to(values.dtype) @ region.split(values, self.grid) for region, a in parts
        )
        return torch.cat([rearrange(each, "b t m c -> b (t m) c") for each in merged], dim=1)

    def unmerge(self, values: Tensor) -> Tensor:
        """The product with A^T: a token takes its share of each destination. See :class:`Merge`."""
        parts = torch.split(values, [a.shape[1] * a.shape[2] for a in self.shares], dim=1)
        tiles = (rearrange(x, "b (t m) c -> b t m c", m=a.shape[2]) for x, a in zip(parts, self.shares, strict=True))
        spread = (a.mT.to(values.dtype) @ x for a, x in zip(self.shares, tiles, strict=True))
        bands: dict[int, list[Tensor]] = {}
        for region, each in zip(self.regions, spread, strict=True):
            bands.setdefault(region.rows.start, []).append(region.join(each))
        return torch.cat([torch.cat(band, dim=2) for band in bands.values()], dim=1).flatten(1, 2)


@dataclass(frozen=True)
class ToMA(Reduction):
    """Merging around all three sub-layers, by one assignment."""

    tiles: int = 64  # a square number: 8 x 8
    scale: float = 1000.0  # the paper's tau, by which similarities are multiplied before the softmax

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("scale", self.scale)
        if self.tiles < 1 or math.isqrt(self.tiles) ** 2 != self.tiles:
            raise ValueError(f"tiles is {self.tiles}, expected a square number, such as 64")

    def match(self, tokens: TokenSet) -> tuple[Merge, Merge, Merge]:
        """See :class:`Reduction`. Similarities are cosines, in float32 at least."""
        check_dense(tokens)
        regions = self.regions(tokens.grid)
        if not self._merges(tokens.grid):
            return Merge(), Merge(), Merge()
        directions = F.normalize(at_least_float32(tokens.values), dim=-1, eps=1e-12)
        shares, chosen = [], []
        for region in regions:
            tiles = region.split(directions, tokens.grid)
            similarity = tiles @ tiles.mT
            chosen.append(facility_location(similarity, self.destinations(region.tokens)))
            shares.append((self.scale * _take_rows(similarity, chosen[-1])).softmax(dim=-2))
        assignment = Assignment(tokens.grid, regions, tuple(shares), tuple(chosen))
        return assignment, assignment, assignment

    def regions(self, grid: tuple[int, int]) -> tuple[Region, ...]:
        """The tiles of a ``grid``, as nearly equal as its sides allow: equal ones together, in raster order.

        A tile is at least two tokens high and wide if the grid is, so on a small grid there are fewer.
        """
        rows, columns = (_spans(side, max(1, min(math.isqrt(self.tiles), side // 2))) for side in grid)
        return tuple(Region(*spans) for spans in product(rows, columns))

    def destinations(self, tokens: int) -> int:
        """m, of a tile of so many tokens: the share 1 - r, rounded down, at least 1."""
        return max(1, int(tokens * (1 - self.ratio) + 1e-9))  # 10 x (1 - 0.9) is less than 1

    def counts(self, grid: tuple[int, int]) -> tuple[int, int, int, int]:
        """See :class:`Reduction`."""
        m = sum(region.tiles * self.destinations(region.tokens) for region in self.regions(grid))
        return m, m, m, m

    def flops(self, grid: tuple[int, int], channels: int) -> int:
        """Of the similarities within tiles, and of merging and unmerging around three sub-layers."""
        if not self._merges(grid):
            return 0
        sizes = [(region.tiles, region.tokens, self.destinations(region.tokens)) for region in self.regions(grid)]
        return sum(2 * channels * tiles * s * (s + 6 * m) for tiles, s, m in sizes)

    def _merges(self, grid: tuple[int, int]) -> bool:
        return self.counts(grid)[0] < math.prod(grid)


def facility_location(similarity: Tensor, count: int) -> Tensor:
    """Greedy choice of ``count`` destinations (..., m) by which every token (..., s, s) has a similar one.

    The next destination is the token that adds most to the sum, over all tokens, of the similarity to their nearest
    destination. No token is chosen twice; of those that add most, up to ``TIE``, the first is.
    """
    best = torch.full_like(similarity[..., 0, :], -1.0)  # the least cosine, so that the first has the largest row sum
    chosen = torch.zeros_like(similarity[..., :0, 0], dtype=torch.int64)
    for _ in range(count):
        gain = (similarity - best.unsqueeze(-2)).relu().sum(dim=-1).scatter(-1, chosen, -1.0)
        following = (gain >= gain.amax(dim=-1, keepdim=True) - TIE).to(torch.uint8).argmax(dim=-1, keepdim=True)
        best = torch.maximum(best, _take_rows(similarity, following).squeeze(-2))
        chosen = torch.cat([chosen, following], dim=-1)
    return chosen


def _take_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Rows (..., m, s) of ``x`` (..., s, s) at ``indices`` (..., m)."""
    return x.gather(-2, indices.unsqueeze(-1).expand(*indices.shape, x.shape[-1]))


def _spans(side: int, tiles: int) -> list[Span]:
    """``side`` positions in so many tiles; where it is no multiple, the first tiles have one more."""
    size, more = divmod(side, tiles)
    spans = [Span(0, more, size + 1), Span(more * (size + 1), tiles - more, size)]
    return [span for span in spans if span.tiles]
