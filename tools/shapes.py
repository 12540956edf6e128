"""The drawn world of the bundled model: scenes of one or two plain objects, their captions and their pictures.

A caption reads "a SIZE COLOR SHAPE [RELATION a SIZE COLOR SHAPE] on a BACKGROUND background". Lengths are shares of the
picture's side, x to the right, y down, so that one scene is the same picture at every side. Randomness comes from the
generator handed in and from nowhere else.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
RGB = tuple[int, int, int]

# Any two of these ten colors are at least 108 apart in RGB: the detector's room for a model's color error.
COLORS: dict[str, RGB] = {
    "red": (215, 25, 35),
    "green": (30, 160, 60),
    "blue": (30, 70, 230),
    "yellow": (255, 230, 40),
    "orange": (255, 130, 0),
    "purple": (150, 30, 180),
    "cyan": (0, 220, 230),
}
BACKGROUNDS: dict[str, RGB] = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}
SHAPES = ("circle", "square", "triangle")
SIZES: dict[str, tuple[float, float]] = {"small": (0.10, 0.13), "big": (0.19, 0.22)}  # range of the radius
RELATIONS = ("left of", "right of", "above", "below")

MARGIN = 0.03  # least distance from an object to the picture's edge
GAP = 0.04  # least distance between two objects along the axis of their relation
SLANT = 0.5  # offset across the relation's axis, at most this share of the offset along it
ONE_OBJECT = 0.3  # share of scenes with a single object
HELD_OUT = 10  # one caption in so many is a test caption, kept from training
NEW_PAIRS = frozenset({("cyan", "triangle")})  # color and shape that training never shows together

_CAPTION = re.compile(
    r"a (?P<size>\S+) (?P<color>\S+) (?P<shape>\S+)"
    rf"(?: (?P<relation>{'|'.join(RELATIONS)}) a (?P<size2>\S+) (?P<color2>\S+) (?P<shape2>\S+))?"
    r" on a (?P<background>\S+) background"
)


@dataclass(frozen=True)
class Thing:
    """An object as a caption names it. Raises ``ValueError`` for a word that is not of this world."""

    size: str
    color: str
    shape: str

    def __post_init__(self) -> None:
        _require_word("size", self.size, SIZES)
        _require_word("color", self.color, COLORS)
        _require_word("shape", self.shape, SHAPES)

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Place:
    """Where an object is drawn: the center and half the side of its (square) bounding box."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What a caption says, and, for a scene that can be drawn, the place of each object.

    ``relation`` is where the first object stands as seen from the second, ``None`` for a single object. Scenes are
    equal when their captions are: places do not count. Raises ``ValueError`` for a scene that no caption describes.
    """

    background: str
    objects: tuple[Thing, ...]
    relation: str | None = None
    places: tuple[Place, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        _require_word("background", self.background, BACKGROUNDS)
        if len(self.objects) not in (1, 2):
            raise ValueError(f"scene has {len(self.objects)} objects, expected 1 or 2")
        if len(self.objects) == 1 and self.relation is not None:
            raise ValueError(f"scene of one object has relation {self.relation!r}, expected None")
        if len(self.objects) == 2:
            _require_word("relation", self.relation, RELATIONS)
            if self.objects[0].color == self.objects[1].color:
                raise ValueError(f"both objects are {self.objects[0].color}, expected two different colors")
        if len(self.places) not in (0, len(self.objects)):
            raise ValueError(f"scene has {len(self.places)} places, expected none or {len(self.objects)}")

    @property
    def caption(self) -> str:
        """For example "a small red circle above a big blue square on a white background"."""
        objects = f" {self.relation} ".join(f"a {thing}" for thing in self.objects)
        return f"{objects} on a {self.background} background"


def parse_caption(text: str) -> Scene:
    """The scene that a caption describes, without places. Raises ``ValueError`` naming the word that is wrong."""
    match = _CAPTION.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"caption is {text!r}, expected 'a SIZE COLOR SHAPE [RELATION a SIZE COLOR SHAPE] "
            f"on a BACKGROUND background' with RELATION one of {', '.join(RELATIONS)}"
        )
    objects = [Thing(match["size"], match["color"], match["shape"])]
    if match["relation"]:
        objects.append(Thing(match["size2"], match["color2"], match["shape2"]))
    return Scene(match["background"], tuple(objects), match["relation"])


def has_new_pair(caption: str) -> bool:
    """Whether a caption names one of ``NEW_PAIRS``."""
    return any(f" {color} {shape} " in caption for color, shape in NEW_PAIRS)


def held_out(scene: Scene) -> bool:
    """Whether training never sees this scene's caption: a test caption, or one with a new pair."""
    return _for_tests(scene) or has_new_pair(scene.caption)


def _for_tests(scene: Scene) -> bool:
    """Whether this is one of the tenth of all captions that are test captions; the same on every machine.

    "A left of B" and "B right of A" describe the same pictures, so both fall on the same side.
    """
    relation, objects = scene.relation, scene.objects
    if relation in ("right of", "below"):
        relation, objects = {"right of": "left of", "below": "above"}[relation], objects[::-1]
    return zlib.crc32(Scene(scene.background, objects, relation).caption.encode()) % HELD_OUT == 0


def random_scene(rng: random.Random, split: str | None = None) -> Scene:
    """A scene with places: of the ``"train"`` captions, the ``"test"`` captions, or (``None``) of all.

    Test captions have a new pair as often as all captions have, training captions never.
    """
    if split not in ("train", "test", None):
        raise ValueError(f"split is {split!r}, expected 'train', 'test' or None")
    count = 1 if rng.random() < ONE_OBJECT else 2
    while True:
        scene = _random_description(rng, count)
        if split is None or (_for_tests(scene) if split == "test" else not held_out(scene)):
            return Scene(scene.background, scene.objects, scene.relation, _random_places(rng, scene))


def draw(scene: Scene, side: int) -> Picture:
    """The picture of a scene, (side, side, 3), edges anti-aliased over one pixel.

    Raises ``ValueError`` for a scene without places.
    """
    if not scene.places:
        raise ValueError(f"scene {scene.caption!r} has no places, expected one made by random_scene")
    picture = np.full((side, side, 3), BACKGROUNDS[scene.background], dtype=np.uint8)
    for thing, place in zip(scene.objects, scene.places, strict=True):
        columns, x = _pixels(place.x, place.radius, side)
        rows, y = _pixels(place.y, place.radius, side)
        depth = signed_depth(thing.shape, x[None, :], y[:, None], place.radius * side)
        coverage = np.clip(depth + 0.5, 0, 1)[..., None]
        box = picture[rows, columns]
        color = np.array(COLORS[thing.color], dtype=np.float32)
        box[:] = np.rint(box + coverage * (color - box))
    return picture


def signed_depth(shape: str, x: NDArray[np.float32], y: NDArray[np.float32], radius: float) -> NDArray[np.float32]:
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


def _pixels(center: float, radius: float, side: int) -> tuple[slice, NDArray[np.float32]]:
    """The pixels that an object can touch along one axis, and their centers' offsets from its center, in pixels."""
    start, stop = max(0, int((center - radius) * side) - 1), min(side, int((center + radius) * side) + 2)
    return slice(start, stop), np.arange(start, stop, dtype=np.float32) + np.float32(0.5 - center * side)


def _random_description(rng: random.Random, count: int) -> Scene:
    colors = rng.sample(list(COLORS), count)
    objects = tuple(Thing(rng.choice(list(SIZES)), color, rng.choice(SHAPES)) for color in colors)
    relation = rng.choice(RELATIONS) if count == 2 else None
    return Scene(rng.choice(list(BACKGROUNDS)), objects, relation)


def _random_places(rng: random.Random, scene: Scene) -> tuple[Place, ...]:
    radii = [rng.uniform(*SIZES[thing.size]) for thing in scene.objects]
    if len(radii) == 1:
        low, high = MARGIN + radii[0], 1 - MARGIN - radii[0]
        return (Place(rng.uniform(low, high), rng.uniform(low, high), radii[0]),)
    if scene.relation in ("right of", "below"):  # ``near`` is the object closer to the left or upper edge
        far, near = radii
    else:
        near, far = radii
    # Along the relation's axis: what the objects, the gap and the margins leave over is spent at random.
    spare = 1 - 2 * MARGIN - 2 * near - 2 * far - GAP
    before, within = sorted((rng.uniform(0, spare), rng.uniform(0, spare)))
    near_main = MARGIN + before + near
    far_main = MARGIN + within + 2 * near + GAP + far
    # Across it: the second object stays within SLANT of the first.
    reach = SLANT * (far_main - near_main)
    near_cross = rng.uniform(MARGIN + near, 1 - MARGIN - near)
    far_cross = rng.uniform(max(MARGIN + far, near_cross - reach), min(1 - MARGIN - far, near_cross + reach))
    spots = [(near_main, near_cross, near), (far_main, far_cross, far)]
    if scene.relation in ("right of", "below"):
        spots.reverse()
    horizontal = scene.relation in ("left of", "right of")
    return tuple(Place(*((main, cross) if horizontal else (cross, main)), radius) for main, cross, radius in spots)


def _require_word(kind: str, word: str | None, words: Collection[str]) -> None:
    if word not in words:
        raise ValueError(f"{kind} is {word!r}, expected one of {', '.join(words)}")
