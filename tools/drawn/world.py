"""The drawn world of the bundled model: scenes of one or two objects, and their captions.

A caption reads "a SIZE [COLOR] SHAPE [RELATION a SIZE [COLOR] SHAPE] on a BACKGROUND background". A *plain* caption
names every color: objects differ in color and have no pattern. An *open* caption leaves out at least one color. The
picture chooses it, and agrees with itself: all objects have one color and one pattern (``Look``), and that color tints
the background. Lengths are shares of the picture's side, x to the right, y down, so one scene gives the same picture at
every size. The only source of randomness is the generator that is passed in.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from tools.drawn.patterns import FLAT, Pattern, random_pattern

RGB = tuple[int, int, int]

# Any two of these ten colors are at least 108 apart in RGB, so the detector tolerates color errors of a model.
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
# Backgrounds by name, and their regions. The border of two regions passes near the center.
GROUNDS: dict[str, tuple[str, ...]] = {
    **{word: (word,) for word in BACKGROUNDS},
    **{f"{one} and {two}": (one, two) for one, two in (("black", "white"), ("black", "gray"), ("gray", "white"))},
}
SHAPES = ("circle", "square", "triangle")
SIZES: dict[str, tuple[float, float]] = {  # range of the radius
    "small": (0.10, 0.13),
    "big": (0.19, 0.22),
    "huge": (0.28, 0.31),
}
PLAIN_SIZES = ("small", "big")  # of plain captions
LEAST_OPEN_RADIUS = 0.12  # in an open scene, so that a small object shows its pattern
RELATIONS = ("left of", "right of", "above", "below")

MARGIN = 0.03  # smallest distance from an object to the picture's edge
GAP = 0.04  # smallest distance between two objects along the axis of their relation
SLANT = 0.5  # offset across the relation's axis, at most this share of the offset along it
ONE_OBJECT = 0.3  # share of scenes with a single object
HELD_OUT = 10  # one caption in ten is a test caption, which training never sees
PLAIN = 1 / 3  # share of plain scenes in the mixed world
ONE_COLOR = 0.3  # share of open scenes of two objects that name the color of one
BORDER = 0.12  # largest distance of the border of two regions from the center
NEW_PAIRS = frozenset({("cyan", "triangle")})  # color and shape that training never shows together

_CAPTION = re.compile(
    r"a (?P<size>\S+)(?: (?P<color>\S+))? (?P<shape>\S+)"
    rf"(?: (?P<relation>{'|'.join(RELATIONS)}) a (?P<size2>\S+)(?: (?P<color2>\S+))? (?P<shape2>\S+))?"
    r" on a (?P<background>\S+(?: and \S+)?) background"
)


@dataclass(frozen=True)
class Thing:
    """An object as a caption names it; ``color`` is ``None`` where the caption leaves it open.

    Raises ``ValueError`` for an unknown word.
    """

    size: str
    color: str | None
    shape: str

    def __post_init__(self) -> None:
        _require_word("size", self.size, SIZES)
        if self.color is not None:
            _require_word("color", self.color, COLORS)
        _require_word("shape", self.shape, SHAPES)

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.color, self.shape) if word)


@dataclass(frozen=True)
class Place:
    """The place of an object: the center and half the side of its square bounding box."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Paint:
    """How an object is painted: a color and, with a darker tone of it, a pattern."""

    color: str
    pattern: Pattern = FLAT


@dataclass(frozen=True)
class Look:
    """What the caption of an open scene leaves to the picture.

    ``paints`` has one entry for each object. ``tint`` is the color mixed into the background, or ``None``. ``ground``
    is the background's pattern. ``border`` is that of two regions: the direction (radians) from the first region to the
    second, and the distance from the center along it. In scenes of :func:`random_open_scene` all parts agree. The
    detector must refuse other looks.
    """

    paints: tuple[Paint, ...]
    tint: str | None
    ground: Pattern = FLAT
    border: tuple[float, float] | None = None


@dataclass(frozen=True)
class Scene:
    """The content of a caption and, if it can be drawn, the place of each object.

    ``relation`` is where the first object is relative to the second, ``None`` for a single object. An open scene that
    can be drawn also has a ``look``. Scenes are equal if their captions are; places and look do not count.
    Raises ``ValueError`` for a scene that no caption describes.
    """

    background: str
    objects: tuple[Thing, ...]
    relation: str | None = None
    places: tuple[Place, ...] = field(default=(), compare=False)
    look: Look | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _require_word("background", self.background, GROUNDS)
        if len(self.objects) not in (1, 2):
            raise ValueError(f"scene has {len(self.objects)} objects, expected 1 or 2")
        if len(self.objects) == 1 and self.relation is not None:
            raise ValueError(f"scene of one object has relation {self.relation!r}, expected None")
        if len(self.objects) == 2:
            _require_word("relation", self.relation, RELATIONS)
        if self.open:
            _require_pair(self.objects)
        else:
            self._require_plain()
        if len(self.places) not in (0, len(self.objects)):
            raise ValueError(f"scene has {len(self.places)} places, expected none or {len(self.objects)}")
        if (self.look is not None) != (self.open and bool(self.places)):
            raise ValueError(f"scene {self.caption!r} has look {self.look}, expected one if it is open and has places")

    def _require_plain(self) -> None:
        _require_word("background of a scene whose colors are all named", self.background, BACKGROUNDS)
        for thing in self.objects:
            _require_word("size of an object in a scene whose colors are all named", thing.size, PLAIN_SIZES)
        if len({thing.color for thing in self.objects}) < len(self.objects):
            raise ValueError(f"both objects are {self.objects[0].color}, expected two different colors")

    @property
    def open(self) -> bool:
        """Whether the caption leaves out a color."""
        return any(thing.color is None for thing in self.objects)

    @property
    def named_color(self) -> str | None:
        """The color of an open scene, if its caption names it for one object."""
        return next((thing.color for thing in self.objects if thing.color), None) if self.open else None

    @property
    def caption(self) -> str:
        """For example "a small red circle above a big blue square on a white background"."""
        objects = f" {self.relation} ".join(f"a {thing}" for thing in self.objects)
        return f"{objects} on a {self.background} background"


def parse_caption(text: str) -> Scene:
    """The scene that a caption describes, without places. Raises ``ValueError`` that names the wrong word."""
    match = _CAPTION.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"caption is {text!r}, expected 'a SIZE [COLOR] SHAPE [RELATION a SIZE [COLOR] SHAPE] "
            f"on a BACKGROUND background' with RELATION one of {', '.join(RELATIONS)}"
        )
    objects = [Thing(match["size"], match["color"], match["shape"])]
    if match["relation"]:
        objects.append(Thing(match["size2"], match["color2"], match["shape2"]))
    return Scene(match["background"], tuple(objects), match["relation"])


def has_new_pair(caption: str) -> bool:
    """Whether a caption has one of ``NEW_PAIRS``. In an open one, a named color counts for both objects.

    Text of another grammar has none.
    """
    try:
        scene = parse_caption(caption)
    except ValueError:
        return False
    return any((thing.color or scene.named_color, thing.shape) in NEW_PAIRS for thing in scene.objects)


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
    """A plain scene with places, from the ``"train"`` captions, the ``"test"`` captions, or all (``None``).

    Test captions have new pairs as often as all captions, training captions never have them.
    """
    _require_split(split)
    count = 1 if rng.random() < ONE_OBJECT else 2
    while True:
        scene = _random_description(rng, count)
        if _in_split(scene, split):
            return replace(scene, places=_random_places(rng, scene))


def random_open_scene(rng: random.Random, split: str | None = None) -> Scene:
    """An open scene with places and a look that agrees; ``split`` as in :func:`random_scene`."""
    _require_split(split)
    while not _in_split(scene := _random_open_description(rng), split):
        pass
    return replace(scene, places=_random_places(rng, scene), look=_random_look(rng, scene))


def mixed_scene(rng: random.Random, split: str | None = None) -> Scene:
    """A scene of the whole world, a third of them plain; ``split`` as in :func:`random_scene`."""
    return (random_scene if rng.random() < PLAIN else random_open_scene)(rng, split)


WORLDS: dict[str, Callable[[random.Random, str | None], Scene]] = {"mixed": mixed_scene, "plain": random_scene}


def mixed_captions(count: int, split: str | None = "test") -> tuple[str, ...]:
    """``count`` different captions, the same ones every time: every third is plain, the others are open.

    ``split`` is as in :func:`random_scene`. Raises as :func:`distinct_captions`.
    """
    plain = distinct_captions(random.Random("evaluate"), random_scene, -(-count // 3), split)
    others = distinct_captions(random.Random("evaluate open"), random_open_scene, count - len(plain), split)
    return tuple(plain[i // 3] if i % 3 == 0 else others[i - i // 3 - 1] for i in range(count))


def distinct_captions(
    rng: random.Random, scenes: Callable[[random.Random, str | None], Scene], count: int, split: str | None = "test"
) -> tuple[str, ...]:
    """The first ``count`` different captions of ``scenes``; ``split`` is as in :func:`random_scene`.

    Raises ``ValueError`` if there are fewer, or if they are not found in ``1000 + 5 * count`` draws.
    """
    captions: dict[str, None] = {}
    for _ in range(1000 + 5 * count):
        if len(captions) >= count:
            return tuple(captions)
        captions[scenes(rng, split).caption] = None
    raise ValueError(f"{count} captions are asked for, expected 1 to {len(captions)}: what the drawn world has")


def _random_description(rng: random.Random, count: int) -> Scene:
    colors = rng.sample(list(COLORS), count)
    objects = tuple(Thing(rng.choice(PLAIN_SIZES), color, rng.choice(SHAPES)) for color in colors)
    relation = rng.choice(RELATIONS) if count == 2 else None
    return Scene(rng.choice(list(BACKGROUNDS)), objects, relation)


def _random_open_description(rng: random.Random) -> Scene:
    if rng.random() < ONE_OBJECT:
        sizes, relation, named = [rng.choice(list(SIZES))], None, None
    else:
        pairs = [[one, two] for one in SIZES for two in SIZES if _fit(one, two)]
        sizes, relation = rng.choice(pairs), rng.choice(RELATIONS)
        named = rng.choice((0, 1)) if rng.random() < ONE_COLOR else None
    shapes = rng.sample(SHAPES, 2) if len(set(sizes)) < len(sizes) else rng.choices(SHAPES, k=len(sizes))
    objects = tuple(
        Thing(size, rng.choice(list(COLORS)) if index == named else None, shape)
        for index, (size, shape) in enumerate(zip(sizes, shapes, strict=True))
    )
    (background,) = rng.choices(list(GROUNDS), weights=[3 - len(regions) for regions in GROUNDS.values()])
    return Scene(background, objects, relation)


def _random_look(rng: random.Random, scene: Scene) -> Look:
    """One color and one pattern for all objects. The color makes a new pair only if the caption names it."""
    shapes = {thing.shape for thing in scene.objects}
    free = [color for color in COLORS if not any((color, shape) in NEW_PAIRS for shape in shapes)]
    color = scene.named_color or rng.choice(free)
    paint = Paint(color, random_pattern(rng))
    border = None
    if len(GROUNDS[scene.background]) == 2:
        border = (rng.uniform(0, 2 * math.pi), rng.uniform(-BORDER, BORDER))
    return Look((paint,) * len(scene.objects), color, random_pattern(rng), border)


def _random_places(rng: random.Random, scene: Scene) -> tuple[Place, ...]:
    least = LEAST_OPEN_RADIUS if scene.open else 0.0
    radii = [rng.uniform(max(least, SIZES[thing.size][0]), SIZES[thing.size][1]) for thing in scene.objects]
    if len(radii) == 1:
        low, high = MARGIN + radii[0], 1 - MARGIN - radii[0]
        return (Place(rng.uniform(low, high), rng.uniform(low, high), radii[0]),)
    if scene.relation in ("right of", "below"):  # ``near`` is the object closer to the left or upper edge
        far, near = radii
    else:
        near, far = radii
    # Along the relation's axis: objects, gap and margins leave some space, which is divided at random.
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


def _in_split(scene: Scene, split: str | None) -> bool:
    return split is None or (_for_tests(scene) if split == "test" else not held_out(scene))


def _fit(one: str, two: str) -> bool:
    """Whether objects of two sizes always fit beside each other."""
    return 2 * SIZES[one][1] + 2 * SIZES[two][1] + GAP + 2 * MARGIN <= 1


def _require_pair(objects: Sequence[Thing]) -> None:
    """Checks that two objects of an open scene fit, and differ in size or shape, so that a relation is unambiguous."""
    sizes = [thing.size for thing in objects]
    if len(sizes) == 2 and not _fit(*sizes):
        raise ValueError(f"objects are {sizes[0]} and {sizes[1]}, expected a small one beside a huge one")
    if len(sizes) == 2 and (objects[0].size, objects[0].shape) == (objects[1].size, objects[1].shape):
        raise ValueError(f"both objects are a {objects[0].size} {objects[0].shape}, expected another size or shape")


def _require_split(split: str | None) -> None:
    if split not in ("train", "test", None):
        raise ValueError(f"split is {split!r}, expected 'train', 'test' or None")


def _require_word(kind: str, word: str | None, words: Collection[str]) -> None:
    if word not in words:
        raise ValueError(f"{kind} is {word!r}, expected one of {', '.join(words)}")
