"""Reads an open picture of the drawn world: tinted backgrounds of one or two regions, objects with patterns.

Every cell is assigned to the nearest of these lines in RGB: tints, from each background color towards each palette
color, and objects, from each palette color to its darker tone. Objects are connected cells of object lines. Soft edges
are measured between the background on that side of the border and the tone of the object's nearest inner cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tools.drawn.painting import SHADE, TINT, TINT_SWING, Picture
from tools.drawn.read_patterns import Likeness, read_pattern
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
from tools.drawn.world import BACKGROUNDS, COLORS, GROUNDS, Scene

COLOR_ERROR = 75.0  # largest RGB distance of a cell from its line
LEAST_REGION = 0.12  # smallest share of the background for a region
STRAIGHT = 0.97  # smallest share of two regions' cells on their side of the best straight border
ONE_COLOR = 0.85  # smallest share of an object's inner cells in its color
AGREEMENT = 50.0  # largest RGB distance of the mean colors of two objects of one color
SAME_KIND = 0.05  # a pattern may have this much less correlation than the object's best one
SAME_ANGLE = math.radians(20)  # largest angle between two patterns of one direction
SAME_PERIOD = 1.25  # largest ratio of the periods of two equal patterns
LEAST_CORRELATION = 0.5  # smallest correlation of an object with its best pattern; below, it has no known one
TINTS = (0.0, TINT + TINT_SWING + 0.04)  # start and end of a tint's line, as shares of the color


@dataclass(frozen=True)
class PaintedObject(Outline):
    """An object, its color, the mean color (RGB) of its inner cells, and the best pattern of each kind."""

    color: str
    mean: tuple[float, float, float]
    patterns: dict[str, Likeness]

    @property
    def kinds(self) -> set[str]:
        """The kinds of pattern that the object may have; empty if it is similar to none."""
        best = max(each.correlation for each in self.patterns.values())
        return {
            kind for kind, each in self.patterns.items() if each.correlation >= max(LEAST_CORRELATION, best - SAME_KIND)
        }

    @property
    def pattern(self) -> str:
        """The most likely pattern, for example "stripes at 40 degrees, 1/13 of the side"."""
        kind, best = max(self.patterns.items(), key=lambda each: each[1].correlation)
        if kind == "plain":
            return kind
        angle = math.degrees(best.pattern.angle)
        return f"{kind} at {angle:.0f} degrees, 1/{1 / best.pattern.period:.0f} of the side"

    def __str__(self) -> str:
        return f"{self.described(self.color)} ({self.pattern})"


@dataclass(frozen=True)
class FoundOpen:
    """Everything read from a picture."""

    background: str | None  # one of GROUNDS; None where the regions are unknown
    tints: dict[str, str | None]  # of each region; None: no color
    objects: tuple[PaintedObject, ...]  # largest first
    unknown: float  # share of the picture covered by patches that are neither object nor background

    def __str__(self) -> str:
        things = [f"a {thing}" for thing in self.objects] or ["nothing"]
        if self.unknown:
            things.append(f"patches of no known color ({self.unknown:.1%} of the picture)")
        tints = ", ".join(f"{word} tinted {tint or 'by nothing'}" for word, tint in self.tints.items())
        return f"{' and '.join(things)} on a {self.background or 'unknown'} background ({tints})"


def look(picture: Picture) -> FoundOpen:
    """Reads background and objects from a picture (side, side, 3) of 8-bit RGB. Raises as ``grid_of_cells``."""
    cells = grid_of_cells(picture)
    ground, color, distance = _nearest_lines(cells)
    cores = components((color >= 0) & (distance <= COLOR_ERROR))
    taken = np.zeros((GRID, GRID), dtype=bool)
    for core in cores:
        taken |= grow(core, EDGE)
    free = (ground >= 0) & ~taken
    words = [
        word for index, word in enumerate(BACKGROUNDS) if (free & (ground == index)).sum() > LEAST_REGION * free.sum()
    ]
    background = next((name for name, regions in GROUNDS.items() if set(regions) == set(words)), None)
    names = list(BACKGROUNDS)
    masks = [free & (ground == names.index(word)) for word in words]
    side = _second_region(*masks) if background and len(masks) == 2 else np.zeros((GRID, GRID), dtype=bool)
    if side is None or background is None:
        return FoundOpen(None, {}, (), 1.0)
    means = [np.median(cells[mask], axis=0) for mask in masks]
    behind = np.where(side[..., None], means[-1], means[0])
    objects = []
    for core in cores:
        others = np.zeros_like(core)
        for other in cores:
            others |= other & ~core
        region = (grow(core, 1) & ~others) | (grow(core, EDGE) & ~grow(others, 1))
        objects.append(_measure(cells, color, core, region, behind))
    objects.sort(key=lambda seen: -seen.radius)
    tints = {word: _tint(word, cells[mask].mean(axis=0)) for word, mask in zip(words, masks, strict=True)}
    stray = (distance > COLOR_ERROR) & ~taken
    unknown = float(sum(patch.sum() for patch in components(stray)) / GRID**2)
    return FoundOpen(background, tints, tuple(objects), unknown)


def violations(found: FoundOpen, wanted: Scene) -> list[str]:
    """Reasons why a picture does not show what an open caption says, or does not agree with itself."""
    reasons = []
    if found.background != wanted.background:
        reasons.append(f"background is {found.background or 'unknown'}, expected {wanted.background}")
    if found.unknown:
        reasons.append(f"{found.unknown:.1%} of the picture is neither object nor background")
    if len(found.objects) != len(wanted.objects):
        return [*reasons, f"{len(found.objects)} objects, expected {len(wanted.objects)}"]
    reasons += _best_match(found.objects, wanted)
    color = wanted.named_color or found.objects[0].color
    reasons += [f"an object is {seen.color}, expected {color}" for seen in found.objects if seen.color != color]
    reasons += [
        f"{word} region is tinted by {tint or 'nothing'}, expected {color}"
        for word, tint in found.tints.items()
        if tint != color
    ]
    if len(found.objects) == 2:
        apart = float(np.linalg.norm(np.subtract(found.objects[0].mean, found.objects[1].mean)))
        if apart > AGREEMENT:
            reasons.append(f"colors of the objects are {apart:.0f} apart, expected at most {AGREEMENT:.0f}")
    reasons += [f"the {seen.shape} has a pattern of no known kind" for seen in found.objects if not seen.kinds]
    if len(found.objects) == 2 and not _one_pattern(*found.objects):
        reasons.append(f"patterns are {found.objects[0].pattern} and {found.objects[1].pattern}, expected the same")
    return reasons


def _one_pattern(one: PaintedObject, other: PaintedObject) -> bool:
    """Whether two objects may have the same pattern: kind, direction and period. Shifts may differ."""
    for kind in one.kinds & other.kinds:
        first, second = one.patterns[kind].pattern, other.patterns[kind].pattern
        ratio = max(first.period, second.period) / min(first.period, second.period)
        if first.angle_to(second) <= SAME_ANGLE and ratio <= SAME_PERIOD:
            return True
    return False


def _best_match(seen: tuple[PaintedObject, ...], wanted: Scene) -> list[str]:
    """Wrong shapes, sizes and relation, with the objects in the order that fits best."""
    orders = [seen, seen[::-1]] if len(seen) == 2 else [seen]
    found = []
    for order in orders:
        reasons = []
        for each, thing in zip(order, wanted.objects, strict=True):
            if each.shape != thing.shape:
                reasons.append(f"an object is {each.shape or 'no known shape'}, expected {thing.shape}")
            if each.size != thing.size:
                size = f"{each.size or 'no known size'} (radius {each.radius:.2f})"
                reasons.append(f"the {thing.shape} is {size}, expected {thing.size}")
        if wanted.relation and (relation := relation_of(order[0], order[1])) != wanted.relation:
            reasons.append(f"{wanted.objects[0]} is {relation} {wanted.objects[1]}, expected {wanted.relation}")
        found.append(reasons)
    return min(found, key=len)


def _nearest_lines(cells: Floats) -> tuple[Floats, Floats, Floats]:
    """For each cell: the index of its background or -1, the index of its color or -1, the distance to its line."""
    palette = np.array(list(COLORS.values()), dtype=np.float64)
    bases = np.array(list(BACKGROUNDS.values()), dtype=np.float64)
    grounds = np.stack(
        [_distance(cells, base, base + TINTS[1] * (color - base)) for base in bases for color in palette]
    )
    objects = np.stack([_distance(cells, SHADE * color, color) for color in palette])
    best_ground, best_object = grounds.min(axis=0), objects.min(axis=0)
    is_object = best_object < best_ground
    ground = np.where(is_object, -1, grounds.argmin(axis=0) // len(palette))
    return ground, np.where(is_object, objects.argmin(axis=0), -1), np.minimum(best_ground, best_object)


def _distance(cells: Floats, start: Floats, end: Floats) -> Floats:
    """RGB distance (GRID, GRID) of cells from the straight line between two colors."""
    span = end - start
    share = np.clip((cells - start) @ span / (span @ span), 0, 1)
    return np.asarray(np.linalg.norm(cells - start - share[..., None] * span, axis=-1))


def _second_region(first: Mask, second: Mask) -> Mask | None:
    """The cells beyond the straight border that separates two regions best; ``None`` if no border does it well."""
    rows, columns = np.nonzero(first | second)
    beyond = second[rows, columns]
    y, x = np.mgrid[0:GRID, 0:GRID]
    best, wrong = None, (1 - STRAIGHT) * len(rows)
    for angle in np.arange(72) * 2 * math.pi / 72:
        position = math.cos(angle) * columns + math.sin(angle) * rows
        order = np.argsort(position)
        flags = beyond[order]
        # The border lies after the first i cells. Errors are second cells before it and first cells after it.
        errors = np.concatenate([[0], np.cumsum(flags)]) + np.concatenate([np.cumsum(~flags[::-1])[::-1], [0]])
        index = int(errors.argmin())
        if errors[index] <= wrong and 0 < index < len(rows):
            wrong = errors[index]
            limit = (position[order[index - 1]] + position[order[index]]) / 2
            best = math.cos(angle) * x + math.sin(angle) * y > limit
    return best


def _measure(cells: Floats, color: Floats, core: Mask, region: Mask, behind: Floats) -> PaintedObject:
    """One object: its color by majority, its outline by soft edges, its pattern."""
    inner = core & ~grow(~core, 1)
    colors = color[inner if inner.any() else core]
    votes = np.bincount(colors, minlength=len(COLORS))
    name = list(COLORS)[int(votes.argmax())]
    # An edge cell takes the tone of the inner cells around it, so dark and bright tones end at the same place.
    weight, tone = inner.astype(np.float64), cells * inner[..., None]
    for _ in range(2 + EDGE):
        weight, tone = _spread(weight), _spread(tone)
    tone = np.where(inner[..., None], cells, tone / np.maximum(weight, 1e-9)[..., None])
    span = tone - behind
    share = ((cells - behind) * span).sum(axis=-1) / np.maximum((span * span).sum(axis=-1), 1.0)
    share = np.where(region & (weight > 0), np.clip(share, 0, 1), 0)
    full = np.array(COLORS[name], dtype=np.float64)
    tones = cells @ full / (full @ full)
    mean = cells[inner if inner.any() else core].mean(axis=0)
    outline = fit_outline(share)
    known = votes.max() >= ONE_COLOR * votes.sum()
    return PaintedObject(
        color=name if known else "many-colored",
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        patterns=read_pattern(tones, inner if inner.any() else core, 1 - SHADE),
        **vars(outline),
    )


def _spread(values: Floats) -> Floats:
    """The sum of four times each cell and its four neighbors: a step of a Gaussian blur."""
    padded = np.pad(values, [(1, 1), (1, 1)] + [(0, 0)] * (values.ndim - 2))
    return np.asarray(
        4 * values + padded[2:, 1:-1] + padded[:-2, 1:-1] + padded[1:-1, 2:] + padded[1:-1, :-2], dtype=np.float64
    )


def _tint(word: str, mean: Floats) -> str | None:
    """The color whose tint of a background is nearest to a region's mean color; ``None`` if no tint is nearer."""
    base = np.array(BACKGROUNDS[word], dtype=np.float64)
    tints: dict[str | None, Floats] = {None: base}
    tints |= {name: base + TINT * (np.array(color) - base) for name, color in COLORS.items()}
    return min(tints, key=lambda name: float(np.linalg.norm(mean - tints[name])))
