"""Drawn pictures: exact edges, patterns as defined, and one scene at every side."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from tools.drawn.painting import SHADE, TINT, draw, object_mask
from tools.drawn.patterns import FLAT, KINDS, TURN, Pattern, random_pattern
from tools.drawn.world import BACKGROUNDS, COLORS, Look, Paint, Place, Scene, Thing, random_open_scene, random_scene


def scenes(count: int, seed: int = 0, split: str | None = None) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng, split) for _ in range(count)]


def test_same_seed_same_scenes_and_pictures() -> None:
    first, second = scenes(50, 7), scenes(50, 7)
    assert [(scene, scene.places) for scene in first] == [(scene, scene.places) for scene in second]
    assert all(np.array_equal(draw(a, 128), draw(b, 128)) for a, b in zip(first, second, strict=True))
    assert first != scenes(50, 8)


def test_drawing_equals_counting_points() -> None:
    """Coverage by 16 x 16 points a pixel, inside or outside by elementary geometry, in float64."""
    side, points = 64, 16
    worst_mean = worst_max = 0.0
    for scene in scenes(30, 3):
        axis = (np.arange(side * points) + 0.5) / (side * points)
        fine = np.empty((side * points, side * points, 3))
        fine[:] = BACKGROUNDS[scene.background]
        for thing, place in zip(scene.objects, scene.places, strict=True):
            x, y, r = axis[None, :] - place.x, axis[:, None] - place.y, place.radius
            if thing.shape == "circle":
                inside = x**2 + y**2 <= r**2
            elif thing.shape == "square":
                inside = (x >= -r) & (x <= r) & (y >= -r) & (y <= r)
            else:  # width grows from 0 at the top to 2 r at the base
                inside = (y >= -r) & (y <= r) & (2 * np.abs(x) <= y + r)
            fine[inside] = COLORS[thing.color or ""]
        exact = fine.reshape(side, points, side, points, 3).mean(axis=(1, 3))
        error = np.abs(draw(scene, side) - exact)
        worst_mean, worst_max = max(worst_mean, error.mean()), max(worst_max, error.max())
    print(f"drawing: mean error {worst_mean:.3f}, max error {worst_max:.1f} of 255")
    assert worst_mean < 0.3  # edges along the pixel grid are exact, corners and slopes approximate
    assert worst_max < 0.4 * 255  # the tip of a triangle


def test_one_scene_is_the_same_picture_at_every_side() -> None:
    worst = 0.0
    for scene in scenes(50, 4):
        large = draw(scene, 256).reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
        worst = max(worst, float(np.abs(large - draw(scene, 128)).mean()))
    print(f"256 px averaged to 128 px: mean error {worst:.3f} of 255")
    assert worst < 0.2


def test_objects_are_where_the_mask_says() -> None:
    rng = random.Random(1)
    for scene in [*scenes(20, 2), *(random_open_scene(rng) for _ in range(20))]:
        mask, share = object_mask(scene, 128), 0.0
        for thing, place in zip(scene.objects, scene.places, strict=True):
            share += place.radius**2 * {"circle": math.pi, "square": 4, "triangle": 2}[thing.shape]
            assert mask[int(place.y * 128), int(place.x * 128)]
        assert abs(mask.mean() - share) < 0.005
        assert not mask[0].any() and not mask[:, -1].any()


def patterned(kind: str, tint: str | None = "red", ground: Pattern = FLAT) -> Scene:
    look = Look((Paint("red", Pattern(kind, 0.4, 1 / 12, (0.1, 0.7))),), tint, ground)
    return Scene("white", (Thing("huge", None, "square"),), None, (Place(0.5, 0.5, 0.3),), look)


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_has_its_color_and_a_darker_tone(kind: str) -> None:
    inside = draw(patterned(kind), 256)[90:166, 90:166].reshape(-1, 3) / np.array(COLORS["red"])
    tones = np.median(inside, axis=1)
    dark, bright = (tones < SHADE + 0.05).mean(), (tones > 0.95).mean()
    print(f"{kind}: {bright:.0%} bright, {dark:.0%} dark")
    assert tones.min() > SHADE - 0.03 and tones.max() < 1.03
    assert bright == 1 if kind == "plain" else min(bright, dark) > 0.15


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_a_pattern_repeats_with_its_period_and_comes_back_when_turned(kind: str) -> None:
    pattern = random_pattern(random.Random(kind))
    pattern = replace(pattern, kind=kind)
    x, y = np.random.default_rng(0).random((2, 500), dtype=np.float32)
    step = {"blobs": 2 / math.sqrt(3), "waves": 1, "stripes": 1, "checks": 1}[kind] * pattern.period
    angle = pattern.angle + (math.pi / 6 if kind == "blobs" else 0)  # blobs are next to each other between two waves
    moved = pattern.share(x + np.float32(step * math.cos(angle)), y + np.float32(step * math.sin(angle)))
    assert np.abs(moved - pattern.share(x, y)).max() < 1e-3
    half = pattern.share(x + np.float32(step / 2 * math.cos(angle)), y + np.float32(step / 2 * math.sin(angle)))
    assert np.abs(half - pattern.share(x, y)).mean() > 0.2
    assert pattern.angle_to(replace(pattern, angle=pattern.angle + TURN[kind])) < 1e-9
    assert pattern.angle_to(pattern.turned()) == pytest.approx(TURN[kind] / 2)


def test_an_unknown_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="pattern is 'dots', expected one of plain, stripes"):
        Pattern("dots")


@pytest.mark.parametrize("kind", KINDS)
def test_the_background_is_tinted_on_average(kind: str) -> None:
    scene = patterned("plain", ground=Pattern(kind, 1.0, 1 / 14))
    mean = draw(scene, 256)[:40].mean(axis=(0, 1))
    white, red = np.array(BACKGROUNDS["white"]), np.array(COLORS["red"])
    share = (mean - white) @ (red - white) / ((red - white) @ (red - white))
    print(f"{kind}: tinted by {share:.3f}")
    assert abs(share - TINT) < 0.04
    assert np.abs(draw(patterned("plain", tint=None), 64)[0] - white).max() == 0


def test_a_border_divides_two_regions() -> None:
    scene = patterned("plain")
    assert scene.look
    scene = replace(scene, background="black and white", look=replace(scene.look, tint=None, border=(0.0, 0.1)))
    picture = draw(scene, 128)
    assert (picture[0, : int(0.6 * 128) - 1] == 0).all() and (picture[0, int(0.6 * 128) + 1 :] == 255).all()


def test_a_scene_without_places_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="no places"):
        draw(Scene("white", (Thing("big", "red", "circle"),)), 64)
