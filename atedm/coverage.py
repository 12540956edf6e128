"""Rankings that leave no part of the picture without a token: a regular grid, and the best of each window first."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm.tokens import TokenSet

WINDOW = 2  # positions a side
SHIFTS = ((0, 0), (1, 1), (0, 1), (1, 0))  # rows and columns that a grid can be moved by


def grid_order(tokens: TokenSet, shift: int = 0) -> Tensor:
    """Scores (B, n) whose k highest are spread over the grid as evenly as can be, whatever k is; no two are equal.

    From 0 down: minus the place of each position in the order of a dither matrix as large as the grid (Bayer 1973), in
    which the first quarter is every second row and column, and so on. ``shift`` says which of ``SHIFTS`` the matrix is
    moved by: the first quarters of all four are every position.
    """
    down, right = SHIFTS[shift]
    row, column = _rows_and_columns(tokens)
    row, column = row + down, column + right
    place = torch.zeros_like(row)
    for bit in range((max(tokens.grid) - 1 + max(down, right)).bit_length()):  # the finest is the most significant
        place = 4 * place + 2 * ((row >> bit ^ column >> bit) & 1) + (row >> bit & 1)
    return -place


def cover(scores: Tensor, tokens: TokenSet) -> Tensor:
    """Scores (B, n) that rank the best token of each window of ``WINDOW`` x ``WINDOW`` positions before all others.

    Among themselves, the best and the others each keep the order of ``scores`` (B, n). On ties the first wins.
    """
    height, width = (-(-side // WINDOW) for side in tokens.grid)  # windows, the last ones perhaps smaller
    row, column = _rows_and_columns(tokens)
    window = row // WINDOW * width + column // WINDOW
    place = scores.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
    best = place.new_full((len(place), height * width), tokens.count).scatter_reduce(1, window, place, "amin")
    return -torch.where(place == best.gather(1, window), place, place + tokens.count)


def _rows_and_columns(tokens: TokenSet) -> tuple[Tensor, Tensor]:
    """Of the position of each token, (B, n) both."""
    positions = tokens.positions
    if positions is None:
        positions = torch.arange(tokens.count, device=tokens.values.device).expand(tokens.values.shape[0], -1)
    return positions // tokens.grid[1], positions % tokens.grid[1]
