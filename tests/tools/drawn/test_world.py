"""The drawn world obeys its own rules, and the detector reads it back, also through noise and blur."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from PIL.PngImagePlugin import PngInfo
from tools.shapes import (
    BACKGROUNDS,
    COLORS,
    NEW_PAIRS,
    RELATIONS,
    SHAPES,
    SIZES,
    Picture,
    Place,
    Scene,
    Thing,
    draw,
    has_new_pair,
    held_out,
    parse_caption,
    random_scene,
)

from tools import check_shapes
from tools.check_shapes import check, look, one_word_changes

ROOT = Path(__file__).resolve().parents[2]
GENERATOR = np.random.default_rng(0)


def scenes(count: int, seed: int = 0, split: str | None = None) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng, split) for _ in range(count)]


def every_scene() -> list[Scene]:
    things = [Thing(*words) for words in itertools.product(SIZES, COLORS, SHAPES)]
    pairs = [pair for pair in itertools.product(things, things) if pair[0].color != pair[1].color]
    one = [Scene(background, (thing,)) for background in BACKGROUNDS for thing in things]
    return one + [Scene(*words) for words in itertools.product(BACKGROUNDS, pairs, RELATIONS)]


def noisy(picture: Picture) -> Picture:
    return np.clip(np.rint(picture + GENERATOR.normal(0, 15, picture.shape)), 0, 255).astype(np.uint8)


def blurred(picture: Picture) -> Picture:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.BoxBlur(1)))  # 3 x 3 mean


def tinted(picture: Picture) -> Picture:
    return np.clip(np.rint(picture + GENERATOR.uniform(-40, 40, 3)), 0, 255).astype(np.uint8)


# The world


def test_palette_colors_are_far_apart() -> None:
    palette = [np.array(color) for color in (*COLORS.values(), *BACKGROUNDS.values())]
    nearest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(palette, 2))
    print(f"nearest palette colors: {nearest:.1f} apart")
    assert nearest >= 105


def test_captions_read_as_written() -> None:
    red, blue = Thing("small", "red", "circle"), Thing("big", "blue", "square")
    one = Scene("black", (red,))
    two = Scene("white", (red, blue), "above")
    assert one.caption == "a small red circle on a black background"
    assert two.caption == "a small red circle above a big blue square on a white background"


def test_every_caption_parses_back_to_its_scene() -> None:
    everything = every_scene()
    captions = {scene.caption for scene in everything}
    print(f"{len(captions)} captions")
    assert len(captions) == len(everything)
    assert all(parse_caption(scene.caption) == scene for scene in everything)


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("a tiny red circle on a white background", "size is 'tiny'"),
        ("a small brown circle on a white background", "color is 'brown'"),
        ("a small red star on a white background", "shape is 'star'"),
        ("a small red circle on a brown background", "background is 'brown'"),
        ("a small red circle near a big blue square on a white background", "left of, right of, above, below"),
        ("a small red circle above a big red square on a white background", "both objects are red"),
        ("a dog", "caption is 'a dog'"),
        ("", "caption is ''"),
    ],
)
def test_a_wrong_caption_is_refused_by_name(caption: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse_caption(caption)


def test_impossible_scenes_are_refused() -> None:
    red, blue = Thing("small", "red", "circle"), Thing("big", "blue", "square")
    with pytest.raises(ValueError, match="0 objects"):
        Scene("white", ())
    with pytest.raises(ValueError, match="expected None"):
        Scene("white", (red,), "above")
    with pytest.raises(ValueError, match="relation is None"):
        Scene("white", (red, blue))
    with pytest.raises(ValueError, match="1 places"):
        Scene("white", (red, blue), "above", (Place(0.5, 0.5, 0.1),))
    with pytest.raises(ValueError, match="no places"):
        draw(Scene("white", (red,)), 64)


def test_geometry_keeps_its_promises() -> None:
    many = scenes(2000)
    for scene in many:
        for thing, place in zip(scene.objects, scene.places, strict=True):
            low, high = SIZES[thing.size]
            assert low <= place.radius <= high
            assert place.radius + 0.0299 <= min(place.x, place.y, 1 - place.x, 1 - place.y)
        if scene.relation:
            first, second = scene.places
            x, y = first.x - second.x, first.y - second.y
            along, across = {"left of": (-x, y), "right of": (x, y), "above": (-y, x), "below": (y, x)}[scene.relation]
            assert along >= first.radius + second.radius + 0.0399
            assert abs(across) <= 0.5001 * along
    single = sum(len(scene.objects) == 1 for scene in many) / len(many)
    print(f"{single:.1%} of scenes have one object")
    assert 0.27 < single < 0.33


def test_words_are_drawn_evenly() -> None:
    many = scenes(3000)
    drawn: list[tuple[Collection[str], list[str]]] = [
        (COLORS, [scene.objects[0].color for scene in many]),
        (SHAPES, [scene.objects[0].shape for scene in many]),
        (SIZES, [scene.objects[-1].size for scene in many]),
        (BACKGROUNDS, [scene.background for scene in many]),
        (RELATIONS, [scene.relation for scene in many if scene.relation]),
    ]
    for words, found in drawn:
        shares = [found.count(word) / len(found) * len(words) for word in words]
        assert min(shares) > 0.85 and max(shares) < 1.15


def test_split_is_disjoint_and_one_in_ten() -> None:
    share = np.mean([held_out(scene) for scene in every_scene() if not has_new_pair(scene.caption)])
    train, test = scenes(3000, 1, "train"), scenes(3000, 2, "test")
    print(f"{share:.1%} of captions held out")
    assert 0.09 < share < 0.11
    assert not {scene.caption for scene in train} & {scene.caption for scene in test}
    assert not any(map(held_out, train)) and all(map(held_out, test))
    with pytest.raises(ValueError, match="split is 'val'"):
        random_scene(random.Random(0), "val")


def test_training_never_shows_a_new_pair_and_test_captions_name_it_as_often_as_all() -> None:
    def named(split: str | None) -> float:
        pairs = [{(thing.color, thing.shape) for thing in scene.objects} for scene in scenes(3000, 3, split)]
        return float(np.mean([bool(each & NEW_PAIRS) for each in pairs]))

    assert named("train") == 0
    print(f"new pairs in {named('test'):.1%} of test captions, {named(None):.1%} of all")
    assert abs(named("test") - named(None)) < 0.03 < named(None)
    for scene in scenes(300, 4):
        new = any((thing.color, thing.shape) in NEW_PAIRS for thing in scene.objects)
        assert has_new_pair(scene.caption) == new
        assert held_out(scene) or not new
    for color, shape in NEW_PAIRS:  # each of the two is shown, with others
        shown = [thing for scene in scenes(1000, 5, "train") for thing in scene.objects]
        assert {thing.shape for thing in shown if thing.color == color} == {*SHAPES} - {shape}


def test_split_does_not_move() -> None:
    """The bundled weights were trained on this split: another hash would leak held-out captions into training."""
    objects = (Thing("small", "red", "circle"), Thing("big", "blue", "square"))
    pairs = [Scene(background, objects, relation) for background in BACKGROUNDS for relation in RELATIONS]
    singles = [Scene("black", (Thing("big", color, shape),)) for color in COLORS for shape in SHAPES]
    kept_apart = [scene.caption for scene in pairs + singles if held_out(scene)]
    assert kept_apart == [
        "a small red circle below a big blue square on a white background",
        "a big green square on a black background",
        "a big green triangle on a black background",
        "a big blue circle on a black background",
        "a big cyan square on a black background",
        "a big cyan triangle on a black background",
    ]


def test_a_scene_told_backwards_stays_on_its_side_of_the_split() -> None:
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for scene in every_scene():
        if scene.relation:
            assert held_out(scene) == held_out(Scene(scene.background, scene.objects[::-1], opposite[scene.relation]))


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
            fine[inside] = COLORS[thing.color]
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


# The detector


@pytest.mark.parametrize(("side", "count"), [(64, 100), (128, 300), (200, 100), (256, 300), (1024, 10)])
def test_drawn_pictures_are_read_right(side: int, count: int) -> None:
    verdicts = [check(draw(scene, side), scene.caption) for scene in scenes(count, side)]
    right = sum(verdict.obeyed for verdict in verdicts)
    worst = min(seen.overlap for verdict in verdicts for seen in verdict.found.objects)
    print(f"{side} px: {right} of {count} right, least overlap with the ideal shape {worst:.3f}")
    assert right == count


@pytest.mark.parametrize("harm", [noisy, blurred, tinted])
@pytest.mark.parametrize("side", [128, 256])
def test_harmed_pictures_are_read_right(harm: Callable[[Picture], Picture], side: int) -> None:
    right = sum(check(harm(draw(scene, side)), scene.caption).obeyed for scene in scenes(150, 5))
    print(f"{harm.__name__}, {side} px: {right} of 150 right")
    assert right >= 149


def test_every_one_word_change_is_refused() -> None:
    changes = 0
    for scene in scenes(25, 6):
        picture = noisy(draw(scene, 128))
        for changed in one_word_changes(scene):
            words = [a != b for a, b in zip(scene.caption.split(), changed.caption.split(), strict=False)]
            assert sum(words) == 1 or changed.relation != scene.relation
            verdict = check(picture, changed.caption)
            assert not verdict.obeyed and verdict.reasons, changed.caption
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
    assert check(picture, caption).obeyed

    upside_down = check(np.ascontiguousarray(picture[::-1]), caption)
    assert any("no known shape, expected triangle" in reason for reason in upside_down.reasons)

    hollow = picture.copy()
    hollow[120:150, 110:146] = BACKGROUNDS["white"]
    assert not check(hollow, caption).obeyed

    twice = picture.copy()
    twice[:60, :60] = np.where(picture[98:158, 98:158] < 255, picture[98:158, 98:158], 255)
    assert "2 red objects, expected 1" in check(twice, caption).reasons

    patch = picture.copy()
    patch[8:40, 8:40] = (110, 60, 0)
    assert any("neither object nor background" in reason for reason in check(patch, caption).reasons)

    two_tone = picture.copy()
    two_tone[:, 180:] = BACKGROUNDS["gray"]
    assert not check(two_tone, caption).obeyed

    two_colors = picture.copy()
    lower = picture[150:].copy()
    lower[(lower != 255).any(axis=-1)] = COLORS["green"]
    two_colors[150:] = lower
    assert any("extra object" in reason for reason in check(two_colors, caption).reasons)

    for plain in (np.full((128, 128, 3), 255, np.uint8), GENERATOR.integers(0, 256, (128, 128, 3), np.uint8)):
        assert not check(plain, caption).obeyed

    speck = picture.copy()
    speck[20:24, 20:24] = COLORS["blue"]
    assert check(speck, caption).obeyed


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


# The command


def save(path: Path, scene: Scene, prompt: str | None) -> None:
    information = PngInfo()
    if prompt is not None:
        information.add_text("prompt", prompt)
    Image.fromarray(draw(scene, 128)).save(path, pnginfo=information)


def test_command_reads_the_prompt_or_a_caption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = Scene("white", (Thing("big", "red", "triangle"),), None, (Place(0.5, 0.5, 0.2),))
    path = tmp_path / "picture.png"
    save(path, scene, scene.caption)
    assert check_shapes.main([str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: obeyed (found {scene.caption})\n"
    assert check_shapes.main([str(path), "a big red circle on a white background"]) == 1
    expected = f"{path}: not obeyed: red object is triangle, expected circle (found {scene.caption})\n"
    assert capsys.readouterr().out == expected


def test_command_on_bad_input_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = scenes(1)[0]
    save(tmp_path / "silent.png", scene, None)
    save(tmp_path / "whole.png", scene, scene.caption)
    (tmp_path / "text.png").write_text("<html>")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    Image.new("RGB", (100, 80)).save(tmp_path / "wide.png")
    for arguments, named in (
        ([], "no picture given"),
        ([str(tmp_path / "none.png")], "none.png"),
        ([str(tmp_path)], "cannot read picture"),
        ([str(tmp_path / "text.png")], "text.png"),
        ([str(tmp_path / "cut.png")], "cut.png"),
        ([str(tmp_path / "silent.png")], "names no prompt"),
        ([str(tmp_path / "wide.png"), scene.caption], "expected square"),
        ([str(tmp_path / "whole.png"), "a dog"], "caption is 'a dog'"),
        (["--self-test", "0"], "--self-test is 0"),
    ):
        assert check_shapes.main(arguments) == 2
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1


@pytest.mark.parametrize("way", [["tools/check_shapes.py"], ["-m", "tools.check_shapes"]])
def test_command_runs_both_ways_and_passes_its_self_test(way: list[str]) -> None:
    command = [sys.executable, *way, "--self-test", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("100.00% of true captions accepted, 100.00% of false ones refused") == 2
