"""The detector reads drawn pictures back, also through noise and blur, and refuses what is not as the caption says."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tools.drawn.detector import check, one_disagreement, one_word_changes, self_test
from tools.drawn.painting import Picture, draw
from tools.drawn.patterns import KINDS, Pattern, random_pattern
from tools.drawn.read_open import look as look_at_open
from tools.drawn.read_open import violations
from tools.drawn.read_plain import look
from tools.drawn.world import BACKGROUNDS, COLORS, Look, Paint, Place, Scene, Thing, random_open_scene, random_scene

GENERATOR = np.random.default_rng(0)


def scenes(count: int, seed: int = 0, split: str | None = None) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng, split) for _ in range(count)]


def noisy(picture: Picture) -> Picture:
    return np.clip(np.rint(picture + GENERATOR.normal(0, 15, picture.shape)), 0, 255).astype(np.uint8)


def blurred(picture: Picture) -> Picture:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.BoxBlur(1)))  # 3 x 3 mean


def tinted(picture: Picture) -> Picture:
    return np.clip(np.rint(picture + GENERATOR.uniform(-40, 40, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("side", "count"), [(64, 100), (128, 300), (200, 100), (256, 300), (1024, 10)])
def test_drawn_pictures_are_read_right(side: int, count: int) -> None:
    checks = [check(draw(scene, side), scene.caption) for scene in scenes(count, side)]
    right = sum(found.right for found in checks)
    worst = min(seen.overlap for each in checks for seen in each.found.objects)
    print(f"{side} px: {right} of {count} right, least overlap with the ideal shape {worst:.3f}")
    assert right == count


@pytest.mark.parametrize("harm", [noisy, blurred, tinted])
@pytest.mark.parametrize("side", [128, 256])
def test_harmed_pictures_are_read_right(harm: Callable[[Picture], Picture], side: int) -> None:
    right = sum(check(harm(draw(scene, side)), scene.caption).right for scene in scenes(150, 5))
    print(f"{harm.__name__}, {side} px: {right} of 150 right")
    assert right >= 149


def test_every_one_word_change_is_refused() -> None:
    changes = 0
    for scene in scenes(25, 6):
        picture = noisy(draw(scene, 128))
        for changed in one_word_changes(scene):
            words = [a != b for a, b in zip(scene.caption.split(), changed.caption.split(), strict=False)]
            assert sum(words) == 1 or changed.relation != scene.relation
            found = check(picture, changed.caption)
            assert not found.right and found.reasons, changed.caption
            changes += 1
    print(f"{changes} changed captions refused")
    assert changes >= 25 * 10


def test_missing_and_extra_objects_are_refused() -> None:
    for scene in scenes(40, 8):
        if not scene.relation:
            continue
        alone = Scene(scene.background, scene.objects[1:], None, scene.places[1:])
        missing, extra = check(draw(alone, 128), scene.caption), check(draw(scene, 128), alone.caption)
        first = scene.objects[0]
        assert missing.reasons == (f"0 {first.color} objects, expected 1",)
        assert extra.reasons == (f"an extra object: {first}",)


def test_places_are_measured_to_a_hundredth() -> None:
    worst = 0.0
    for scene in scenes(60, 9):
        for seen in look(draw(scene, 256)).objects:
            index = [thing.color for thing in scene.objects].index(seen.color)
            place = scene.places[index]
            worst = max(worst, abs(seen.x - place.x), abs(seen.y - place.y), abs(seen.radius - place.radius))
    print(f"places: max error {worst:.4f} of the side")
    assert worst < 0.01


def test_other_pictures_are_refused() -> None:
    scene = Scene("white", (Thing("big", "red", "triangle"),), None, (Place(0.5, 0.5, 0.2),))
    caption, picture = scene.caption, draw(scene, 256)
    assert check(picture, caption).right

    upside_down = check(np.ascontiguousarray(picture[::-1]), caption)
    assert any("no known shape, expected triangle" in reason for reason in upside_down.reasons)

    hollow = picture.copy()
    hollow[120:150, 110:146] = BACKGROUNDS["white"]
    assert not check(hollow, caption).right

    twice = picture.copy()
    twice[:60, :60] = np.where(picture[98:158, 98:158] < 255, picture[98:158, 98:158], 255)
    assert "2 red objects, expected 1" in check(twice, caption).reasons

    patch = picture.copy()
    patch[8:40, 8:40] = (110, 60, 0)
    assert any("neither object nor background" in reason for reason in check(patch, caption).reasons)

    two_tone = picture.copy()
    two_tone[:, 180:] = BACKGROUNDS["gray"]
    assert not check(two_tone, caption).right

    two_colors = picture.copy()
    lower = picture[150:].copy()
    lower[(lower != 255).any(axis=-1)] = COLORS["green"]
    two_colors[150:] = lower
    assert any("extra object" in reason for reason in check(two_colors, caption).reasons)

    for plain in (np.full((128, 128, 3), 255, np.uint8), GENERATOR.integers(0, 256, (128, 128, 3), np.uint8)):
        assert not check(plain, caption).right

    speck = picture.copy()
    speck[20:24, 20:24] = COLORS["blue"]
    assert check(speck, caption).right


def test_touching_objects_are_two() -> None:
    objects = (Thing("big", "red", "square"), Thing("small", "blue", "circle"))
    scene = Scene("gray", objects, "left of", (Place(0.4, 0.5, 0.2), Place(0.71, 0.5, 0.11)))
    assert check(draw(scene, 256), scene.caption).reasons == ()


def test_detector_is_deterministic() -> None:
    for scene in scenes(10, 10):
        picture = noisy(draw(scene, 128))
        assert check(picture, scene.caption) == check(picture.copy(), scene.caption)


@pytest.mark.parametrize(
    "picture", [np.zeros((128, 100, 3), np.uint8), np.zeros((63, 63, 3), np.uint8), np.zeros((128, 128, 3), np.float32)]
)
def test_other_arrays_are_refused(picture: Picture) -> None:
    with pytest.raises(ValueError, match=r"picture (is|has)"):
        look(picture)


# Open pictures


def soft(picture: Picture) -> Picture:
    """Blurred by 1 pixel, noise of 8 levels."""
    blur = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1)))
    return np.clip(np.rint(blur + GENERATOR.normal(0, 8, picture.shape)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("side", "harm"), [(128, None), (256, None), (128, soft), (256, soft)])
def test_open_pictures_are_read_right(side: int, harm: Callable[[Picture], Picture] | None) -> None:
    result = self_test(random_open_scene, 10, side, harm)
    print(f"{side} px: {result}")
    assert result.least == 1


def test_every_one_word_change_of_an_open_caption_is_refused() -> None:
    rng, changes = random.Random(11), 0
    for _ in range(12):
        scene = random_open_scene(rng)
        found = look_at_open(draw(scene, 128))
        for changed in one_word_changes(scene):
            assert violations(found, changed), changed.caption
            changes += 1
    assert changes > 120


def pair(first: Paint, second: Paint, tint: str | None = "blue") -> Scene:
    objects = (Thing("small", None, "circle"), Thing("big", None, "square"))
    places = (Place(0.3, 0.22, 0.13), Place(0.35, 0.65, 0.21))
    return Scene("gray", objects, "above", places, Look((first, second), tint, Pattern("waves", 0.3)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_agree_is_named(kind: str) -> None:
    rng = random.Random(kind)
    paint = Paint("blue", replace(random_pattern(rng), kind=kind))
    scene = pair(paint, paint)
    assert check(soft(draw(scene, 128)), scene.caption).reasons == ()
    cases = {
        "region is tinted by red, expected blue": pair(paint, paint, "red"),
        "region is tinted by nothing, expected blue": pair(paint, paint, None),
        "an object is green, expected blue": pair(replace(paint, color="green"), paint),
        "expected the same": pair(replace(paint, pattern=random_pattern(rng, without=kind)), paint),
    }
    if kind != "plain":
        cases["patterns are"] = pair(paint, replace(paint, pattern=paint.pattern.turned()))
    for reason, other in cases.items():
        reasons = check(draw(other, 128), scene.caption).reasons
        assert any(reason in each for each in reasons), (reason, reasons)


def test_a_pattern_is_found_with_its_direction_and_period() -> None:
    worst_angle = worst_period = 0.0
    rng = random.Random(12)
    for _ in range(30):
        scene = random_open_scene(rng)
        assert scene.look
        wanted = scene.look.paints[0].pattern
        for seen in look_at_open(soft(draw(scene, 128))).objects:
            (kind,) = seen.kinds
            assert kind == wanted.kind
            if kind != "plain":
                found = seen.patterns[kind].pattern
                worst_angle = max(worst_angle, np.degrees(found.angle_to(wanted)))
                worst_period = max(worst_period, abs(found.period / wanted.period - 1))
    print(f"patterns: angle to {worst_angle:.1f} degrees, period to {worst_period:.1%}")
    assert worst_angle < 8 and worst_period < 0.12


def test_a_plain_picture_is_not_an_open_one() -> None:
    """Flat colors, and no tint."""
    scene = Scene("white", (Thing("big", "red", "circle"),), None, (Place(0.5, 0.5, 0.2),))
    reasons = check(draw(scene, 128), "a big circle on a white background").reasons
    assert reasons == ("white region is tinted by nothing, expected red",)


def test_other_open_pictures_are_refused() -> None:
    paint = Paint("blue", Pattern("stripes", 0.5))
    scene = pair(paint, paint)
    picture, caption = draw(scene, 128), scene.caption
    extra = draw(replace(scene, places=(Place(0.8, 0.2, 0.13), scene.places[1])), 128)
    extra[:55, :70] = picture[:55, :70]
    assert "3 objects, expected 2" in check(extra, caption).reasons
    patch = picture.copy()
    patch[90:110, 100:120] = (255, 0, 255)
    assert any("neither object nor background" in reason for reason in check(patch, caption).reasons)
    halves = picture.copy()
    halves[90:] = np.where(picture[90:, :, 2:] > 180, np.array(COLORS["red"]), picture[90:])
    assert check(halves, caption).reasons
    random_dots = GENERATOR.integers(0, 256, (128, 128, 3), np.uint8)
    for other in (np.full((128, 128, 3), 128, np.uint8), random_dots):
        assert check(other, caption).reasons
    chaos = picture.copy()  # an object of the right tones with no pattern at all
    tone = np.kron(GENERATOR.random((16, 16, 1)), np.ones((4, 4, 1)))[:54, :54]
    chaos[56:110, 18:72] = ((0.6 + 0.4 * (tone > 0.5)) * np.array(COLORS["blue"])).astype(np.uint8)
    assert check(chaos, caption).reasons


def test_regions_must_be_two_halves() -> None:
    look_ = Look((Paint("blue"),), "blue", border=(0.7, 0.05))
    scene = Scene("black and white", (Thing("big", None, "circle"),), None, (Place(0.5, 0.5, 0.2),), look_)
    picture = draw(scene, 128)
    assert check(picture, scene.caption).right
    rings = picture.copy()
    rings[:20], rings[-20:] = picture[0, 0], picture[0, 0]
    rings[:, :20], rings[:, -20:] = picture[0, 0], picture[0, 0]
    assert any("background is unknown" in reason for reason in check(rings, scene.caption).reasons)


def test_a_disagreement_needs_a_look() -> None:
    with pytest.raises(ValueError, match="has no look"):
        one_disagreement(random.Random(0), random_scene(random.Random(0)))
