"""Read a picture of the drawn world back into words, and say whether it obeys its caption.

    python tools/check_shapes.py PICTURE.png ["CAPTION"]
    python tools/check_shapes.py --self-test 1000

Nothing here is learned or random. The picture is averaged down to a grid of 64 x 64 cells, which removes noise and the
fine errors of a VAE; cells near one palette color form objects; the soft mask of each object is measured between the
background and its own color, so that blurred edges move neither its area nor its center; and the shape is the ideal
one of equal area and centroid that overlaps the mask best. Lengths are shares of the picture's side.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

if __name__ == "__main__":  # run as a file, Python looks for imports in tools/ and not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.shapes import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
    Picture,
    Scene,
    Thing,
    draw,
    parse_caption,
    random_scene,
    signed_depth,
)

GRID = 64  # cells on a side
SPECK = 3  # an object holds at least one block of SPECK x SPECK cells; anything thinner is noise or an edge
COLOR_ERROR = 75.0  # RGB distance up to which a cell may take the nearest palette color; palette colors are 108 apart
EDGE = 2  # soft edges reach at most this many cells beyond the cells that have the object's color
OVERLAP = 0.85  # least intersection over union with the ideal shape; a circle and a square of equal area have 0.83
SIZE_ERROR = 0.03  # slack around the radii of SIZES: just meets midway between small and big
ACCURACY = 0.995  # least share of drawn pictures that the self-test must read right

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class FoundObject:
    """An object read from a picture; ``size`` or ``shape`` is ``None`` where it is none of this world's."""

    color: str
    shape: str | None
    size: str | None
    x: float  # center and half side of the bounding box, as in shapes.Place
    y: float
    radius: float
    overlap: float  # with the best ideal shape, intersection over union

    def __str__(self) -> str:
        size = self.size or f"unknown-size (radius {self.radius:.2f})"
        shape = self.shape or f"unknown-shape (overlap {self.overlap:.2f})"
        return f"{size} {self.color} {shape}"


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


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows exactly what its caption says; ``reasons`` is empty when it does."""

    obeyed: bool
    reasons: tuple[str, ...]
    found: Found


def check(picture: Picture, caption: str) -> Verdict:
    """Compare a picture (side, side, 3) with a caption: exactly the objects named, as named, and the background.

    Raises ``ValueError`` for a caption of another grammar and for a picture that :func:`look` does not take.
    """
    wanted = parse_caption(caption)
    found = look(picture)
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
        relation = _relation(*matched)
        if relation != wanted.relation:
            first, second = wanted.objects
            reasons.append(f"{first.color} is {relation} {second.color}, expected {wanted.relation}")
    return Verdict(not reasons, tuple(reasons), found)


def look(picture: Picture) -> Found:
    """Read background and objects from a picture (side, side, 3) of 8-bit RGB.

    Raises ``ValueError`` for a picture of another shape or type, or of a side below 64 pixels.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.shape[0] != picture.shape[1]:
        raise ValueError(
            f"picture is {picture.dtype} {picture.shape}, expected square 8-bit RGB: uint8 (side, side, 3)"
        )
    if picture.shape[0] < GRID:
        raise ValueError(f"picture has a side of {picture.shape[0]} pixels, expected {GRID} or more")
    cells = np.asarray(Image.fromarray(picture).resize((GRID, GRID), Image.Resampling.BOX), dtype=np.float64)

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

    cores = [(color, core) for color in COLORS for core in _components(label == names.index(color))]
    objects = []
    for color, core in cores:
        others = np.zeros_like(core)
        for _, other in cores:
            others |= other & ~core
        # Two objects close to each other: the edge cells go to the one that they touch.
        region = (_grow(core, 1) & ~others) | (_grow(core, EDGE) & ~_grow(others, 1))
        objects.append(_measure(cells, color, core, region, background_color))
    objects.sort(key=lambda seen: -seen.radius)
    rest = label != names.index(background)
    for _, core in cores:
        rest &= ~_grow(core, EDGE)
    unknown = float(sum(patch.sum() for patch in _components(rest)) / GRID**2)
    return Found(background, tuple(objects), unknown)


def one_word_changes(scene: Scene) -> Iterator[Scene]:
    """Every scene, without places, whose caption differs from this one's in exactly one attribute."""
    plain = replace(scene, places=())
    yield from (replace(plain, background=name) for name in BACKGROUNDS if name != scene.background)
    if scene.relation:
        yield from (replace(plain, relation=name) for name in RELATIONS if name != scene.relation)
    taken = {thing.color for thing in scene.objects}
    for index, thing in enumerate(scene.objects):
        changed = [replace(thing, size=size) for size in SIZES if size != thing.size]
        changed += [replace(thing, color=color) for color in COLORS if color not in taken]
        changed += [replace(thing, shape=shape) for shape in SHAPES if shape != thing.shape]
        for other in changed:
            yield replace(plain, objects=(*scene.objects[:index], other, *scene.objects[index + 1 :]))


def self_test(count: int, side: int) -> tuple[int, int]:
    """Draw ``count`` scenes: how many are read right with their caption, and with one false word instead."""
    rng = random.Random(0)
    accepted = refused = 0
    for _ in range(count):
        scene = random_scene(rng)
        picture = draw(scene, side)
        accepted += check(picture, scene.caption).obeyed
        refused += not check(picture, rng.choice(list(one_word_changes(scene))).caption).obeyed
    return accepted, refused


def _differences(seen: FoundObject, thing: Thing) -> list[str]:
    reasons = []
    if seen.shape != thing.shape:
        reasons.append(f"{thing.color} object is {seen.shape or 'no known shape'}, expected {thing.shape}")
    if seen.size != thing.size:
        reasons.append(
            f"{thing.color} object is {seen.size or 'no known size'} (radius {seen.radius:.2f}), expected {thing.size}"
        )
    return reasons


def _relation(first: FoundObject, second: FoundObject) -> str:
    x, y = first.x - second.x, first.y - second.y
    if abs(x) > abs(y):
        return "left of" if x < 0 else "right of"
    return "above" if y < 0 else "below"


def _measure(cells: Floats, color: str, core: Mask, region: Mask, background: Floats) -> FoundObject:
    """Shape, size and place of one object, from the share of its own color that each cell of ``region`` holds."""
    span = np.median(cells[core], axis=0) - background
    share = np.where(region, np.clip((cells - background) @ span / (span @ span), 0, 1), 0)
    area = share.sum()
    axis = np.arange(GRID) + 0.5
    x, y = (share.sum(axis=0) @ axis) / area, (share.sum(axis=1) @ axis) / area
    crisp = _crisp(share - 0.5)
    fits = []
    for shape, square_radii, drop in (("circle", np.pi, 0.0), ("square", 4.0, 0.0), ("triangle", 2.0, 1 / 3)):
        radius = float(np.sqrt(area / square_radii))
        center_y = float(y - drop * radius)  # a triangle's centroid lies below the center of its bounding box
        offsets = (axis[None, :] - x).astype(np.float32), (axis[:, None] - center_y).astype(np.float32)
        ideal = _crisp(signed_depth(shape, *offsets, radius))
        overlap = float(np.minimum(crisp, ideal).sum() / np.maximum(crisp, ideal).sum())
        fits.append((overlap, shape, radius / GRID, center_y / GRID))
    overlap, best, radius, center_y = max(fits)
    sizes = [name for name, (low, high) in SIZES.items() if low - SIZE_ERROR <= radius < high + SIZE_ERROR]
    return FoundObject(
        color=color,
        shape=best if overlap >= OVERLAP else None,
        size=sizes[0] if sizes else None,
        x=float(x) / GRID,
        y=center_y,
        radius=radius,
        overlap=overlap,
    )


def _crisp(depth: NDArray[np.floating[Any]]) -> Floats:
    """Coverage of cells whose centers lie ``depth`` cells inside an edge, with the edge narrowed to half a cell.

    Half a cell forgives a blurred edge more than a whole one would, and noise more than a hard threshold.
    """
    return np.asarray(np.clip(2 * depth + 0.5, 0, 1), dtype=np.float64)


def _components(mask: Mask) -> list[Mask]:
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


def _grow(mask: Mask, cells: int) -> Mask:
    """The mask and every cell within ``cells`` of it, rows, columns and diagonals alike."""
    for _ in range(cells):
        rows = mask.copy()
        rows[1:] |= mask[:-1]
        rows[:-1] |= mask[1:]
        mask = rows.copy()
        mask[:, 1:] |= rows[:, :-1]
        mask[:, :-1] |= rows[:, 1:]
    return mask


def _open(path: Path) -> tuple[Picture, str | None]:
    """A picture file as RGB, and the ``prompt`` that its PNG metadata names. Raises ``ValueError`` if unreadable."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB")), image.info.get("prompt")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as raised by Pillow's readers
        raise ValueError(f"cannot read picture {path}: {error}") from error


def _run(arguments: argparse.Namespace) -> bool:
    if arguments.self_test is not None:
        if arguments.self_test < 1:
            raise ValueError(f"--self-test is {arguments.self_test}, expected 1 or more")
        good = True
        for side in (128, 256):
            accepted, refused = (number / arguments.self_test for number in self_test(arguments.self_test, side))
            good = good and min(accepted, refused) >= ACCURACY
            print(f"{side} px: {accepted:.2%} of true captions accepted, {refused:.2%} of false ones refused")
        return good
    if arguments.picture is None:
        raise ValueError("no picture given, expected a file or --self-test N")
    picture, prompt = _open(arguments.picture)
    caption = arguments.caption or prompt
    if not caption:
        raise ValueError(f"{arguments.picture} names no prompt in its metadata, expected a caption after the file")
    verdict = check(picture, caption)
    result = "obeyed" if verdict.obeyed else f"not obeyed: {'; '.join(verdict.reasons)}"
    print(f"{arguments.picture}: {result} (found {verdict.found})")
    return verdict.obeyed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Exit status: 0 obeyed (or self-test good), 1 not, 2 bad input with one line on stderr."""
    parser = argparse.ArgumentParser(description="Say whether a picture of the drawn world obeys its caption.")
    parser.add_argument("picture", nargs="?", type=Path, help="a square picture file of at least 64 pixels a side")
    parser.add_argument("caption", nargs="?", help="default: the prompt in the PNG's metadata")
    parser.add_argument("--self-test", type=int, metavar="N", help="check N drawn scenes at 128 and at 256 pixels")
    try:
        return 0 if _run(parser.parse_args(arguments)) else 1
    except ValueError as error:
        print(f"check_shapes: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
