"""Grids of cells from pictures: connected parts, soft edges, and the ideal shape that fits an object best.

A picture is averaged to 64 x 64 cells, which removes noise and small errors of a VAE. Lengths are shares of the
picture's side unless they are in cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

from tools.drawn.painting import Picture, signed_depth
from tools.drawn.world import SIZES

GRID = 64  # cells on a side
SPECK = 3  # an object has at least one block of SPECK x SPECK cells; thinner parts are noise or edges
EDGE = 2  # soft edges reach at most this many cells beyond the cells that have the object's color
OVERLAP = 0.85  # smallest intersection over union with the ideal shape; circle and square of equal area have 0.83
SIZE_ERROR = 0.03  # tolerance around the radii of SIZES: ranges of two sizes meet in the middle

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Outline:
    """Shape, size and place of an object; ``size`` or ``shape`` is ``None`` where it is unknown."""

    shape: str | None
    size: str | None
    x: float  # center and half side of the bounding box, as in world.Place
    y: float
    radius: float
    overlap: float  # with the best ideal shape, intersection over union

    def described(self, color: str) -> str:
        """The object in words, for example "small red circle"."""
        size = self.size or f"unknown-size (radius {self.radius:.2f})"
        shape = self.shape or f"unknown-shape (overlap {self.overlap:.2f})"
        return f"{size} {color} {shape}"


def grid_of_cells(picture: Picture) -> Floats:
    """Mean colors of the cells of a picture (side, side, 3) of 8-bit RGB, (GRID, GRID, 3).

    Raises ``ValueError`` for a picture of another shape or type, or of a side below 64 pixels.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.shape[0] != picture.shape[1]:
        raise ValueError(
            f"picture is {picture.dtype} {picture.shape}, expected square 8-bit RGB: uint8 (side, side, 3)"
        )
    if picture.shape[0] < GRID:
        raise ValueError(f"picture has a side of {picture.shape[0]} pixels, expected {GRID} or more")
    return np.asarray(Image.fromarray(picture).resize((GRID, GRID), Image.Resampling.BOX), dtype=np.float64)


def fit_outline(share: Floats) -> Outline:
    """The ideal shape that fits an object best; the object covers ``share`` (GRID, GRID), in [0, 1], of each cell."""
    area = share.sum()
    axis = np.arange(GRID) + 0.5
    x, y = (share.sum(axis=0) @ axis) / area, (share.sum(axis=1) @ axis) / area
    covered = crisp(share - 0.5)
    fits = []
    for shape, square_radii, drop in (("circle", np.pi, 0.0), ("square", 4.0, 0.0), ("triangle", 2.0, 1 / 3)):
        radius = float(np.sqrt(area / square_radii))
        center_y = float(y - drop * radius)  # a triangle's centroid lies below the center of its bounding box
        offsets = (axis[None, :] - x).astype(np.float32), (axis[:, None] - center_y).astype(np.float32)
        ideal = crisp(signed_depth(shape, *offsets, radius))
        overlap = float(np.minimum(covered, ideal).sum() / np.maximum(covered, ideal).sum())
        fits.append((overlap, shape, radius / GRID, center_y / GRID))
    overlap, best, radius, center_y = max(fits)
    sizes = [name for name, (low, high) in SIZES.items() if low - SIZE_ERROR <= radius < high + SIZE_ERROR]
    return Outline(
        shape=best if overlap >= OVERLAP else None,
        size=sizes[0] if sizes else None,
        x=float(x) / GRID,
        y=center_y,
        radius=radius,
        overlap=overlap,
    )


def relation_of(first: Outline, second: Outline) -> str:
    """Where the first object is relative to the second."""
    x, y = first.x - second.x, first.y - second.y
    if abs(x) > abs(y):
        return "left of" if x < 0 else "right of"
    return "above" if y < 0 else "below"


def crisp(depth: NDArray[np.floating[Any]]) -> Floats:
    """Coverage of cells whose centers lie ``depth`` cells inside an edge, with the edge narrowed to half a cell.

    Half a cell tolerates blurred edges better than a whole cell, and noise better than a hard threshold.
    """
    return np.asarray(np.clip(2 * depth + 0.5, 0, 1), dtype=np.float64)


def components(mask: Mask) -> list[Mask]:
    """The 4-connected parts of a mask that hold a block of SPECK x SPECK cells, in reading order."""
    parts = []
    left = {(row, column) for row, column in np.argwhere(mask).tolist()}
    for seed in sorted(left):
        if seed not in left:
            continue
        left.discard(seed)
        cells = [seed]
        for row, column in cells:  # grows while it is walked
            for cell in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if cell in left:
                    left.discard(cell)
                    cells.append(cell)
        part = np.zeros_like(mask)
        part[tuple(np.transpose(cells))] = True
        if len(cells) >= SPECK**2 and sliding_window_view(part, (SPECK, SPECK)).all(axis=(2, 3)).any():
            parts.append(part)
    return parts


def grow(mask: Mask, cells: int) -> Mask:
    """The mask and every cell within ``cells`` of it, rows, columns and diagonals alike."""
    for _ in range(cells):
        rows = mask.copy()
        rows[1:] |= mask[:-1]
        rows[:-1] |= mask[1:]
        mask = rows.copy()
        mask[:, 1:] |= rows[:, :-1]
        mask[:, :-1] |= rows[:, 1:]
    return mask
