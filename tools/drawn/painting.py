"""Draws scenes of the drawn world as pictures. Edges are anti-aliased over one pixel."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tools.drawn.patterns import Pattern
from tools.drawn.world import BACKGROUNDS, COLORS, GROUNDS, SHAPES, Place, Scene

Picture = NDArray[np.uint8]
Field = NDArray[np.float32]

SHADE = 0.6  # the second tone of an object is this share of its color
TINT = 0.2  # mean share of the objects' color in the background of an open scene
TINT_SWING = 0.08  # difference of the two tones of a patterned background from that mean


def draw(scene: Scene, side: int) -> Picture:
    """The picture of a scene, (side, side, 3). Raises ``ValueError`` for a scene without places."""
    if not scene.places:
        raise ValueError(f"scene {scene.caption!r} has no places, expected one made by random_scene")
    picture = _draw_ground(scene, side)
    for index, (thing, place) in enumerate(zip(scene.objects, scene.places, strict=True)):
        rows, columns, depth = _depth(thing.shape, place, side)
        coverage = np.clip(depth + 0.5, 0, 1)[..., None]
        box = picture[rows, columns]
        color: Field
        if scene.look is None:
            assert thing.color is not None
            color = np.array(COLORS[thing.color], dtype=np.float32)
        else:
            paint = scene.look.paints[index]
            share = _share(paint.pattern, rows, columns, side)
            color = (np.float32(SHADE) + np.float32(1 - SHADE) * share) * np.array(COLORS[paint.color], np.float32)
        box[:] = np.rint(box + coverage * (color - box))
    return picture


def object_mask(scene: Scene, side: int) -> NDArray[np.bool_]:
    """Mask (side, side) of the pixels whose centers lie inside an object."""
    mask = np.zeros((side, side), dtype=bool)
    for thing, place in zip(scene.objects, scene.places, strict=True):
        rows, columns, depth = _depth(thing.shape, place, side)
        mask[rows, columns] |= depth > 0
    return mask


def signed_depth(shape: str, x: Field, y: Field, radius: float) -> Field:
    """How deep points lie inside a shape centered on the origin (negative outside), in the unit of ``x`` and ``y``.

    The bounding box of each shape is the square of side ``2 * radius``; the triangle stands on its base.
    """
    if shape == "circle":
        return np.asarray(radius - np.sqrt(x * x + y * y), dtype=np.float32)
    if shape == "square":
        return np.asarray(radius - np.maximum(np.abs(x), np.abs(y)), dtype=np.float32)
    if shape == "triangle":  # two sides from (0, -radius) to (+-radius, radius), of slope 2, and the base
        return np.asarray(np.minimum((y + radius - 2 * np.abs(x)) / np.sqrt(5), radius - y), dtype=np.float32)
    raise ValueError(f"shape is {shape!r}, expected one of {', '.join(SHAPES)}")


def _draw_ground(scene: Scene, side: int) -> Picture:
    words, look = GROUNDS[scene.background], scene.look
    picture = np.full((side, side, 3), BACKGROUNDS[words[0]], dtype=np.uint8)
    if look is None:
        return picture
    whole = slice(0, side)
    ground: Field = np.array(BACKGROUNDS[words[0]], dtype=np.float32)
    if look.border is not None:
        angle, offset = look.border
        x, y = _centers(whole, side) - np.float32(0.5), _centers(whole, side)[:, None] - np.float32(0.5)
        beyond = (math.cos(angle) * x + math.sin(angle) * y - offset) * side
        other = np.array(BACKGROUNDS[words[1]], dtype=np.float32)
        ground = ground + np.clip(beyond + 0.5, 0, 1).astype(np.float32)[..., None] * (other - ground)
    if look.tint is not None:
        swing = 0 if look.ground.kind == "plain" else TINT_SWING
        tint = np.float32(TINT - swing) + np.float32(2 * swing) * _share(look.ground, whole, whole, side)
        ground = ground + tint * (np.array(COLORS[look.tint], dtype=np.float32) - ground)
    picture[:] = np.rint(ground)
    return picture


def _depth(shape: str, place: Place, side: int) -> tuple[slice, slice, Field]:
    """Rows and columns that an object can touch, and how deep their centers lie inside it, in pixels."""
    columns, rows = _pixels(place.x, place.radius, side), _pixels(place.y, place.radius, side)
    x = np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5 - place.x * side)
    y = np.arange(rows.start, rows.stop, dtype=np.float32) + np.float32(0.5 - place.y * side)
    return rows, columns, signed_depth(shape, x[None, :], y[:, None], place.radius * side)


def _pixels(center: float, radius: float, side: int) -> slice:
    return slice(max(0, int((center - radius) * side) - 1), min(side, int((center + radius) * side) + 2))


def _centers(pixels: slice, side: int) -> Field:
    return (np.arange(pixels.start, pixels.stop, dtype=np.float32) + np.float32(0.5)) / np.float32(side)


def _share(pattern: Pattern, rows: slice, columns: slice, side: int) -> Field:
    """A pattern's share of the first tone at the pixels of a box, (rows, columns, 1)."""
    return pattern.share(_centers(columns, side)[None, :], _centers(rows, side)[:, None])[..., None]
