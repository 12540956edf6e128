"""ToDo (token downsampling): self-attention asks for all tokens, but reads keys and values of a coarser grid alone.

Source: Smith, Saxena and Saha 2024, "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images",
arXiv:2402.13573. There is no matching, and nothing to undo afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from atedm.reduction import Merge, Reduction, check_dense
from atedm.tokens import TokenSet


@dataclass(frozen=True, eq=False)
class KeysAt(Merge):
    """Keys and values of the tokens at ``positions`` (k,)."""

    positions: Tensor

    def context(self, values: Tensor) -> Tensor:
        """See :class:`Merge`."""
        return values.index_select(1, self.positions)


@dataclass(frozen=True)
class ToDo(Reduction):
    """Downsampling by which a share r of the keys and values is left out: 0.75 is every second row and column."""

    def match(self, tokens: TokenSet) -> tuple[Merge, Merge, Merge]:
        """See :class:`Reduction`. Nearest-neighbour downsampling: row i of h' is row floor(i h / h') of h."""
        check_dense(tokens)
        coarse = self.coarse(tokens.grid)
        if coarse == tokens.grid:
            return Merge(), Merge(), Merge()
        row, column = (
            torch.arange(few, device=tokens.values.device) * side // few
            for few, side in zip(coarse, tokens.grid, strict=True)
        )
        return KeysAt((row[:, None] * tokens.grid[1] + column).flatten()), Merge(), Merge()

    def coarse(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(H', W') of the coarser grid: both sides times sqrt(1 - r), rounded down as in their code, at least 1."""
        # The small number makes 0.888889 every third row and column.
        height, width = (max(1, int(side * math.sqrt(1 - self.ratio) + 1e-3)) for side in grid)
        return height, width

    def counts(self, grid: tuple[int, int]) -> tuple[int, int, int, int]:
        """See :class:`Reduction`."""
        n = math.prod(grid)
        return n, math.prod(self.coarse(grid)), n, n

    def flops(self, grid: tuple[int, int], channels: int) -> int:
        """None: the positions do not depend on the tokens."""
        return 0
