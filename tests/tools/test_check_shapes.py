"""The command that checks a picture: what it prints, its exit status, and its self-test."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tools import check_shapes
from tools.drawn.painting import draw
from tools.drawn.world import Place, Scene, Thing, random_scene

ROOT = Path(__file__).resolve().parents[2]


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
    assert capsys.readouterr().out == f"{path}: as its caption says (found {scene.caption})\n"
    assert check_shapes.main([str(path), "a big red circle on a white background"]) == 1
    expected = f"{path}: not as its caption says: red object is triangle, expected circle (found {scene.caption})\n"
    assert capsys.readouterr().out == expected


def test_command_on_bad_input_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = random_scene(random.Random(0))
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
        ([str(tmp_path / "silent.png")], "has no prompt"),
        ([str(tmp_path / "wide.png"), scene.caption], "expected square"),
        ([str(tmp_path / "whole.png"), "a dog"], "caption is 'a dog'"),
        (["--self-test", "0"], "--self-test is 0"),
    ):
        assert check_shapes.main(arguments) == 2
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1


@pytest.mark.parametrize("way", [["tools/check_shapes.py"], ["-m", "tools.check_shapes"]])
def test_command_runs_both_ways_and_passes_its_self_test(way: list[str]) -> None:
    command = [sys.executable, *way, "--self-test", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("100.00% of true captions accepted, 100.00% of false ones refused") == 8
    assert done.stdout.count("100.00% of disagreements refused") == 4
