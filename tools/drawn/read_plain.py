"""Reads a plain picture of the drawn world: cells near one palette color form objects on a flat background.

The soft mask of each object is measured between the background and its own color, so blurred edges change neither its
area nor its center. Its shape is the ideal shape of equal area and centroid that overlaps the mask best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tools.drawn.painting import Picture
from tools.drawn.regions import (
    EDGE,
    GRID,
    Floats,
    Mask,
    Outline,
    components,
    fit_outline,
    grid_of_cells,
    grow,
    relation_of,
)
from tools.drawn.world import BACKGROUNDS, COLORS, Scene, Thing

COLOR_ERROR = 75.0  # largest RGB distance of a cell from its palette color; palette colors are 108 apart


@dataclass(frozen=True)
class FoundObject(Outline):
    """An object read from a picture, and its color."""

    color: str

    def __str__(self) -> str:
        return self.described(self.color)


@dataclass(frozen=True)
class Found:
    """Everything read from a picture."""

    background: str | None  # None where the border has no background color
    objects: tuple[FoundObject, ...]  # largest first
    unknown: float  # share of the picture covered by patches that are neither object nor background

    def __str__(self) -> str:
        things = [f"a {thing}" for thing in self.objects] or ["nothing"]
        if self.unknown:
            things.append(f"patches of no known color ({self.unknown:.1%} of the picture)")
        return f"{' and '.join(things)} on a {self.background or 'unknown'} background"


def look(picture: Picture) -> Found:
    """Reads background and objects from a picture (side, side, 3) of 8-bit RGB. Raises as ``grid_of_cells``."""
    cells = grid_of_cells(picture)
    names = [*COLORS, *BACKGROUNDS]
    palette = np.array([*COLORS.values(), *BACKGROUNDS.values()], dtype=np.float64)
    error = cells[:, :, None] - palette  # (GRID, GRID, 9, 3)
    distance = np.sqrt(np.einsum("ijkc, ijkc -> ijk", error, error))
    label = np.where(distance.min(axis=-1) <= COLOR_ERROR, distance.argmin(axis=-1), len(names))

    border = np.ones((GRID, GRID), dtype=bool)
    border[1:-1, 1:-1] = False
    counts = [int((label[border] == names.index(name)).sum()) for name in BACKGROUNDS]
    if max(counts) < border.sum() / 2:
        return Found(None, (), 1.0)
    background = list(BACKGROUNDS)[int(np.argmax(counts))]
    background_color = np.median(cells[border & (label == names.index(background))], axis=0)

    cores = [(color, core) for color in COLORS for core in components(label == names.index(color))]
    objects = []
    for color, core in cores:
        others = np.zeros_like(core)
        for _, other in cores:
            others |= other & ~core
        # Edge cells between two close objects belong to the one that they touch.
        region = (grow(core, 1) & ~others) | (grow(core, EDGE) & ~grow(others, 1))
        objects.append(_measure(cells, color, core, region, background_color))
    objects.sort(key=lambda seen: -seen.radius)
    rest = label != names.index(background)
    for _, core in cores:
        rest &= ~grow(core, EDGE)
    unknown = float(sum(patch.sum() for patch in components(rest)) / GRID**2)
    return Found(background, tuple(objects), unknown)


def violations(found: Found, wanted: Scene) -> list[str]:
    """Reasons why a picture does not show exactly the objects and the background of a plain caption."""
    reasons = []
    if found.background != wanted.background:
        reasons.append(f"background is {found.background or 'unknown'}, expected {wanted.background}")
    matched = []
    for thing in wanted.objects:  # the objects of a scene differ in color
        same_color = [seen for seen in found.objects if seen.color == thing.color]
        if len(same_color) == 1:
            matched.append(same_color[0])
            reasons += _differences(same_color[0], thing)
        else:
            reasons.append(f"{len(same_color)} {thing.color} objects, expected 1")
    named = {thing.color for thing in wanted.objects}
    reasons += [f"an extra object: {seen}" for seen in found.objects if seen.color not in named]
    if found.unknown:
        reasons.append(f"{found.unknown:.1%} of the picture is neither object nor background")
    if wanted.relation and len(matched) == 2:
        relation = relation_of(*matched)
        if relation != wanted.relation:
            first, second = wanted.objects
            reasons.append(f"{first.color} is {relation} {second.color}, expected {wanted.relation}")
    return reasons


def _differences(seen: FoundObject, thing: Thing) -> list[str]:
    reasons = []
    if seen.shape != thing.shape:
        reasons.append(f"{thing.color} object is {seen.shape or 'no known shape'}, expected {thing.shape}")
    if seen.size != thing.size:
        reasons.append(
            f"{thing.color} object is {seen.size or 'no known size'} (radius {seen.radius:.2f}), expected {thing.size}"
        )
    return reasons


def _measure(cells: Floats, color: str, core: Mask, region: Mask, background: Floats) -> FoundObject:
    """Shape, size and place of one object, from the share of its own color that each cell of ``region`` holds."""
    span = np.median(cells[core], axis=0) - background
    share = np.where(region, np.clip((cells - background) @ span / (span @ span), 0, 1), 0)
    outline = fit_outline(share)
    return FoundObject(color=color, **vars(outline))
