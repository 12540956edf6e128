"""``python -m minisdxl.sample``: what it writes, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from atedm import PRESETS
from minisdxl.sample import main

PROMPT = "a small red circle above a big blue square on a white background"
QUICK = ["--steps", "2", "--size", "64x64"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that must fail with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    print(err, end="")
    return err


def test_picture_holds_what_it_takes_to_make_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "picture.png"
    main([PROMPT, *QUICK, "--seed", "5", "--prune", "at-edm:rho=0.5", "--out", str(file)])
    line = capsys.readouterr().out
    image = Image.open(file)
    assert image.size == (64, 64)
    record = json.loads(image.text["minisdxl"])  # type: ignore[attr-defined]
    assert (record["prompt"], record["seed"], record["steps"]) == (PROMPT, 5, 2)
    assert (record["prune"], record["size"], record["weights"]) == ("at-edm:rho=0.5", "64x64", "shapes.safetensors")
    assert len(record["sha256"]) == 64
    assert str(file) in line
    assert "seed 5" in line
    assert "% of dense FLOPs" in line
    again = tmp_path / "again.png"
    settings = [f"--{key}={record[key]}" for key in ("seed", "steps", "cfg", "size", "prune", "negative", "dtype")]
    main([record["prompt"], *settings, "--out", str(again)])
    assert Image.open(again).tobytes() == image.tobytes()


def test_each_prompt_has_its_own_seed_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [PROMPT, "a big green triangle on a black background", "a small blue circle on a gray background"]
    main([*prompts, *QUICK, "--seed", "10", "--batch", "2", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines] == ["seed 10", "seed 11", "seed 12"]
    records = [json.loads(Image.open(line.split("  ")[0]).text["minisdxl"]) for line in lines]  # type: ignore[attr-defined]
    assert [record["prompt"] for record in records] == prompts
    assert [record["seed"] for record in records] == [10, 11, 12]


def test_compare_puts_dense_and_pruned_side_by_side(tmp_path: Path) -> None:
    main([PROMPT, *QUICK, "--compare", "--out", str(tmp_path / "both.png")])
    main([PROMPT, *QUICK, "--out", str(tmp_path / "dense.png")])
    main([PROMPT, *QUICK, "--prune", "--out", str(tmp_path / "pruned.png")])
    both = Image.open(tmp_path / "both.png")
    label = both.height - 64
    for column, name in enumerate(("dense", "pruned")):
        half = both.crop((64 * column, label, 64 * (column + 1), label + 64))
        assert half.tobytes() == Image.open(tmp_path / f"{name}.png").tobytes()


def test_list_names_every_preset_and_its_cost(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--prune", "list"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(PRESETS)
    assert all(line.count("%") == 2 for line in lines[1:])


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_makes_a_picture(preset: str, tmp_path: Path) -> None:
    main([PROMPT, *QUICK, "--prune", preset, "--out", str(tmp_path / "x.png")])
    assert json.loads(Image.open(tmp_path / "x.png").text["minisdxl"])["prune"] == preset  # type: ignore[attr-defined]


def test_budget_sets_the_ratio_and_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = ["--prune", "at-edm:tau=10", "--budget", "90%", "--size", "256x256", "--steps", "1"]
    main([PROMPT, *budget, "--out", str(tmp_path / "x.png")])
    record = json.loads(Image.open(tmp_path / "x.png").text["minisdxl"])  # type: ignore[attr-defined]
    assert record["prune"].startswith("at-edm:tau=10,rho=0.")
    share = float(capsys.readouterr().out.rsplit("  ", 1)[1].split("%")[0])
    assert 89 <= share <= 90


def test_long_prompt_warns_and_shows_what_was_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([" ".join(["circle"] * 75) + " triangle", *QUICK, "--out", str(tmp_path / "long.png")])
    assert "cut off 'triangle'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--size", "100x64"], "100"),
        (["--size", "64"], "64"),
        (["--size", "64x100000"], "100000"),
        (["--steps", "0"], "0"),
        (["--steps", "1001"], "1001"),
        (["--steps", "ten"], "ten"),
        (["--prune", "at-edm:rho=1"], "rho is 1.0"),
        (["--prune", "at-edm:rho=-0.1"], "rho is -0.1"),
        (["--prune", "nonesuch"], "nonesuch"),
        (["--prune", "at-edm:color=red"], "color"),
        (["--device", "abacus"], "abacus"),
        (["--dtype", "int3"], "int3"),
        (["--seed", "-1"], "-1"),
        (["--batch", "0"], "0"),
        (["--cfg", "nan"], "nan"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--budget", "90%"], "--prune"),
        (["--prune", "--budget", "10%"], "out of reach"),
        (["--prune", "--budget", "cheap"], "cheap"),
        (["--prune", "at-edm:rho=0.5", "--budget", "90%"], "twice"),
        (["--out", "picture.jpeg"], "picture.jpeg"),
        (["--tokenizer", "nowhere"], "nowhere"),
        (["another prompt", "--out", "one.png"], "one.png"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named in refused(capsys, PROMPT, *QUICK, *arguments)
    assert not list(tmp_path.rglob("*.png"))


def test_device_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "mps" in refused(capsys, PROMPT, *QUICK, "--device", "mps", "--out", str(tmp_path))


def test_output_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "file" in refused(capsys, PROMPT, *QUICK, "--out", str(tmp_path / "file" / "x.png"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_to_full_disk(self: Image.Image, path: Path, **options: object) -> None:
        path.write_bytes(b"half a picture")
        with open("/dev/full", "wb") as full:
            full.write(b"x" * 100_000)

    monkeypatch.setattr(Image.Image, "save", save_to_full_disk)
    assert "No space left" in refused(capsys, PROMPT, *QUICK, "--out", str(tmp_path / "x.png"))
    assert not list(tmp_path.iterdir())


def test_interrupt_leaves_no_partial_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_until_interrupted(self: Image.Image, path: Path, **options: object) -> None:
        path.write_bytes(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", save_until_interrupted)
    with pytest.raises(SystemExit) as stop:
        main([PROMPT, *QUICK, "--out", str(tmp_path / "x.png")])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted: no partial picture was left\n"
    assert not list(tmp_path.iterdir())


def test_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minisdxl.sample", PROMPT, *QUICK, "--prune", "--out", str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""  # no progress bar: this is no terminal
    assert Image.open(tmp_path / "x.png").size == (64, 64)
