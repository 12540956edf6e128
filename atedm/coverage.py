"""Rankings that keep tokens everywhere in the picture: on a regular grid, or the best token of each window."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm.tokens import TokenSet

WINDOW = 2  # positions per side
SHIFTS = ((0, 0), (1, 1), (0, 1), (1, 0))  # rows and columns by which the moving grid is shifted, in turn


def grid_order(tokens: TokenSet, shift: int = 0) -> Tensor:
    """Scores (B, n) whose k highest are spread evenly over the grid, for every k. All scores are different.

    A score is minus the rank of the position in an ordered-dither matrix of the grid's size (Bayer 1973). The first
    quarter of the ranks is every second row and column, and so on recursively. ``shift`` is an index into ``SHIFTS``;
    the first quarters of the four shifts together cover every position.
    """
    down, right = SHIFTS[shift]
    row, column = _rows_and_columns(tokens)
    row, column = row + down, column + right
    place = torch.zeros_like(row)
    for bit in range((max(tokens.grid) - 1 + max(down, right)).bit_length()):  # the finest is the most significant
        place = 4 * place + 2 * ((row >> bit ^ column >> bit) & 1) + (row >> bit & 1)
    return -place


def cover(scores: Tensor, tokens: TokenSet) -> Tensor:
    """Scores (B, n) that put the best token of each window of ``WINDOW`` x ``WINDOW`` positions before all others.

    The best tokens keep the order of ``scores`` (B, n) among themselves, and so do the others. On ties the first wins.
    """
    height, width = (-(-side // WINDOW) for side in tokens.grid)  # number of windows; the last ones may be smaller
    row, column = _rows_and_columns(tokens)
    window = row // WINDOW * width + column // WINDOW
    place = scores.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
    best = place.new_full((len(place), height * width), tokens.count).scatter_reduce(1, window, place, "amin")
    return -torch.where(place == best.gather(1, window), place, place + tokens.count)


def _rows_and_columns(tokens: TokenSet) -> tuple[Tensor, Tensor]:
    """The row and the column of each token, (B, n) both."""
    positions = tokens.positions
    if positions is None:
        positions = torch.arange(tokens.count, device=tokens.values.device).expand(tokens.values.shape[0], -1)
    return positions // tokens.grid[1], positions % tokens.grid[1]
