"""``python -m minisdxl.flops``: its table, its JSON, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from atedm import DENSE, parse_preset
from minisdxl.checkpoint.modules import Modules, save
from minisdxl.config import SDXL_BASE, SHAPES, Level
from minisdxl.cost import count, format_flops, summary
from minisdxl.flops import main
from minisdxl.steps.presets import FAST, SKIPS
from minisdxl.text import TextEncoders
from minisdxl.unet import UNet
from minisdxl.vae import VAE


def test_json_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", "shapes", "--size", "128x256", "--steps", "20", "--prune", "at-edm:rho=0.5", "--json"])
    found, expected = json.loads(capsys.readouterr().out), summary(SHAPES, 64, 32, parse_preset("at-edm:rho=0.5"), 20)
    picture = found.pop("picture")
    assert found == expected
    assert picture["flops"] == pytest.approx(2 * 20 * expected["average"])  # both branches of guidance
    assert picture["dense_flops"] == 2 * 20 * expected["dense"]
    main(["--json", "--prune", "--cfg", "1"])
    found, expected = json.loads(capsys.readouterr().out), summary(SDXL_BASE, 128, 128, parse_preset("at-edm"), 50)
    assert found.pop("picture")["flops"] == pytest.approx(50 * expected["average"])
    assert found == expected


def test_a_picture_under_step_plans(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--steps", "6", "--skip", "deepcache", "--guide", "until:share=0.5"])
    out = capsys.readouterr().out
    assert "  2 steps whole, 4 shallow, 0 forecast; 3 with one branch of guidance\n  WSSWSS\n  BBBCCC\n" in out
    assert max(map(len, out.splitlines())) <= 80
    main(["--skip", "easycache", "--model", "shapes", "--sampling", "euler"])
    assert "at most: easycache decides at each step" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["--skip", "list"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(f"--skip {name} " in out for name in SKIPS) and all(f"--fast {name} " in out for name in FAST)


def test_table_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--prune"])
    out = capsys.readouterr().out
    found = summary(SDXL_BASE, 128, 128, parse_preset("at-edm"), 50)
    heads = {"dense": "dense", "steady": "steady step", "pruneless": "prune-less step", "average": "average"}
    for key, head in heads.items():
        assert f"{head:<19}{format_flops(found[key]):>7}" in out
    assert "50 steps, at-edm" in out
    assert all(f"\n{name} " in out for name in {block["name"] for block in found["blocks"]})
    bars = {line.split()[0]: line.split()[-1] for line in out.splitlines() if "##" in line}
    assert bars["down.2.0"] == bars["mid"] == "#" * 17 + "." * 23  # 288 G of the longest bar's 674 G
    assert bars["convolution"] == "#" * 23  # 1.62 T of 2.86 T
    assert max(map(len, out.splitlines())) <= 80
    main([])
    dense = capsys.readouterr().out
    assert "50 steps, dense" in dense
    assert not any("#." in line for line in dense.splitlines())


def test_model_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip, openclip = (replace(encoder, context_length=33) for encoder in SHAPES.text)
    unet = replace(SHAPES.unet, levels=(Level(1, 0), Level(1, 2)), middle_depth=1)
    config = replace(SHAPES, name="mine", unet=unet, text=(clip, openclip), size=64)
    path = tmp_path / "mine.safetensors"
    save(path, config, Modules(UNet(unet), VAE(config.vae), TextEncoders(config.text)))
    main(["--model", str(path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found.pop("picture")["plan"] == "W" * 50
    assert found == summary(config, 16, 16, None, 50)
    assert found["dense"] == count(config, 16, 16, DENSE, 33).total != count(config, 16, 16, DENSE, 77).total


BAD = {
    "--size 1023x1024": "picture width is 1023 pixels, expected a multiple of 8 from 32 to ",
    "--size 1024": "argument --size: size is '1024', expected WIDTHxHEIGHT in pixels",
    "--steps 5.5": "argument --steps: invalid int value: '5.5'",
    "--prune nothing": "unknown preset 'nothing', expected one of at-edm",
    "--prune at-edm:rho=1": "rho is 1.0, expected 0 <= rho < 1",
    "--model sd15": "unknown model 'sd15', expected sdxl-base, sdxl-inpainting, sdxl-refiner, shapes, or the path of a",
    "--model absent.safetensors": "absent.safetensors",
    "--skip deepcache --fast faithful": "--fast faithful sets --skip, expected one of them",
    "--skip zeus --model shapes": "zeus forecasts predictions, which needs a solver of the ODE",
    "--skip deepcache --steps 1": "deepcache would change nothing: none of the 1 steps skips any work",
    "--skip deepcache --refiner sdxl-refiner": "--refiner with --skip or --guide, expected one of them",
    "--refiner shapes": "shapes is shapes, expected a refiner",
    "--model shapes --refiner sdxl-refiner": "sdxl-refiner has (latent channels, downscale, scale factor, vocabulary)",
    "--refiner-start 0.5": "--refiner-start is 0.5 without --refiner, expected both",
    "--refiner sdxl-refiner --steps 2": "refiner_start 0.8 leaves the refiner none of the steps 0 to 1 of 2",
    "--weights shapes": "unrecognized arguments: --weights shapes",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    out, error = capsys.readouterr()
    print(error, end="")
    assert exit_.value.code == 2
    assert out == ""
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert BAD[arguments] in error


def test_both_models_are_counted_with_a_refiner(capsys: pytest.CaptureFixture[str]) -> None:
    """The last 10 of 50 steps are the refiner's; the average is of all."""
    main(["--refiner", "sdxl-refiner", "--prune", "--json"])
    found = json.loads(capsys.readouterr().out)
    main(["--refiner", "sdxl-refiner", "--prune"])
    text = capsys.readouterr().out
    assert found["steps"] == [40, 10]
    base, refiner = found["base"], found["refiner"]
    assert abs(found["average"] - (40 * base["average"] + 10 * refiner["average"]) / 50) <= 1
    assert abs(found["dense"] - (40 * base["dense"] + 10 * refiner["dense"]) / 50) <= 1
    # The first 15 of 50 steps are prune-less: 15 of the base's 40, and none of the refiner's.
    assert abs(base["average"] - (15 * base["pruneless"] + 25 * base["steady"]) / 40) <= 1
    assert refiner["average"] == refiner["steady"] == refiner["pruneless"] < refiner["dense"]
    assert "sdxl-base, 1024x1024 pixels, steps 0 to 39 of 50, at-edm" in text
    assert "sdxl-refiner, 1024x1024 pixels, steps 40 to 49 of 50, at-edm" in text
    assert f"{found['average'] / found['dense']:.1%} of dense" in text


def test_as_a_module() -> None:
    """Exit codes, nothing but one line of error, and a reader that leaves before the end."""
    command = [sys.executable, "-m", "minisdxl.flops", "--model", "shapes"]
    bad = subprocess.run([*command, "--size", "7x8"], capture_output=True, text=True, timeout=300, check=False)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("python -m minisdxl.flops: error: picture width is 7 pixels")
    assert bad.stderr.count("\n") == 1
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (0, b"")
