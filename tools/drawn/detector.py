"""Detector of the drawn world: checks whether a picture shows what its caption says. Nothing is learned or random.

``tools.drawn.read_plain`` reads pictures of plain captions, ``tools.drawn.read_open`` those of open ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tools.drawn import read_open, read_plain
from tools.drawn.painting import Picture, draw
from tools.drawn.patterns import random_pattern
from tools.drawn.world import (
    BACKGROUNDS,
    COLORS,
    GROUNDS,
    PLAIN_SIZES,
    RELATIONS,
    SHAPES,
    SIZES,
    Look,
    Paint,
    Scene,
    parse_caption,
)


@dataclass(frozen=True)
class CaptionCheck:
    """Whether a picture shows exactly what its caption says; ``reasons`` is empty when it does."""

    right: bool
    reasons: tuple[str, ...]
    found: read_plain.Found | read_open.FoundOpen


def check(picture: Picture, caption: str) -> CaptionCheck:
    """Compares a picture (side, side, 3) with a caption: exactly the objects named, as named, and the background.

    For an open caption it also checks that colors, patterns and tints agree, which the caption leaves to the picture.
    Raises ``ValueError`` for a caption of another grammar, and for a picture that is not square 8-bit RGB of 64 pixels
    or more.
    """
    wanted = parse_caption(caption)
    if wanted.open:
        seen = read_open.look(picture)
        reasons = tuple(read_open.violations(seen, wanted))
        return CaptionCheck(not reasons, reasons, seen)
    found = read_plain.look(picture)
    reasons = tuple(read_plain.violations(found, wanted))
    return CaptionCheck(not reasons, reasons, found)


def one_word_changes(scene: Scene) -> Iterator[Scene]:
    """Every scene, without places, whose caption differs from this one's in exactly one attribute."""
    bare = replace(scene, places=(), look=None)
    sizes, grounds = (SIZES, GROUNDS) if scene.open else (PLAIN_SIZES, BACKGROUNDS)
    yield from (replace(bare, background=name) for name in grounds if name != scene.background)
    if scene.relation:
        yield from (replace(bare, relation=name) for name in RELATIONS if name != scene.relation)
    taken = {thing.color for thing in scene.objects}
    for index, thing in enumerate(scene.objects):
        changed = [replace(thing, size=size) for size in sizes if size != thing.size]
        if thing.color is not None:
            changed += [replace(thing, color=color) for color in COLORS if color not in taken]
        changed += [replace(thing, shape=shape) for shape in SHAPES if shape != thing.shape]
        for other in changed:
            try:
                yield replace(bare, objects=(*scene.objects[:index], other, *scene.objects[index + 1 :]))
            except ValueError:  # two objects do not fit beside each other
                continue


def one_disagreement(rng: random.Random, scene: Scene) -> Scene:
    """An open scene painted with one disagreement: of color, pattern, direction of a pattern, or tint."""
    look = scene.look
    if look is None:
        raise ValueError(f"scene {scene.caption!r} has no look, expected one made by random_open_scene")
    paint = look.paints[0]
    others = [color for color in COLORS if color != paint.color]
    changes: list[Look] = [replace(look, tint=rng.choice([*others, None]))]
    if len(look.paints) == 2:
        false = [Paint(rng.choice(others), paint.pattern)]
        false.append(Paint(paint.color, random_pattern(rng, without=paint.pattern.kind)))
        if paint.pattern.kind != "plain":
            false.append(Paint(paint.color, paint.pattern.turned()))
        changes += [replace(look, paints=(paint, each) if rng.random() < 0.5 else (each, paint)) for each in false]
    return replace(scene, look=rng.choice(changes))


@dataclass(frozen=True)
class SelfTest:
    """Shares of drawn pictures that are read right. ``disagreements`` is ``None`` for plain scenes."""

    accepted: float  # with their caption
    refused: float  # with one word changed
    disagreements: float | None  # refused, with one disagreement

    @property
    def least(self) -> float:
        """The smallest of them."""
        return min(self.accepted, self.refused, 1.0 if self.disagreements is None else self.disagreements)

    def __str__(self) -> str:
        text = f"{self.accepted:.2%} of true captions accepted, {self.refused:.2%} of false ones refused"
        return text if self.disagreements is None else f"{text}, {self.disagreements:.2%} of disagreements refused"


def self_test(
    scenes: Callable[[random.Random], Scene], count: int, side: int, harm: Callable[[Picture], Picture] | None = None
) -> SelfTest:
    """Checks ``count`` drawn scenes with their captions and with false ones. ``harm`` changes every picture first.

    All scenes must be plain, or all open.
    """
    rng = random.Random(0)
    accepted, refused, disagreements = 0, 0, list[bool]()
    for _ in range(count):
        scene = scenes(rng)
        picture = _harmed(scene, side, harm)
        accepted += check(picture, scene.caption).right
        refused += not check(picture, rng.choice(list(one_word_changes(scene))).caption).right
        if scene.open:
            other = _harmed(one_disagreement(rng, scene), side, harm)
            disagreements.append(not check(other, scene.caption).right)
    share = sum(disagreements) / len(disagreements) if disagreements else None
    return SelfTest(accepted / count, refused / count, share)


def _harmed(scene: Scene, side: int, harm: Callable[[Picture], Picture] | None) -> Picture:
    picture = draw(scene, side)
    return picture if harm is None else harm(picture)
