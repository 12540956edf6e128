"""What one call under a preset differs by, computed again from the model, and which tokens stay."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from atedm import DENSE, parse_preset
from minisdxl.pipeline import SDXL
from minisdxl.preconditioning import discrete_sigmas
from tools.evaluation.step_changes import drawn_pictures, outcomes
from tools.single_step import main


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch, load_once: Callable[..., SDXL]) -> None:
    monkeypatch.setattr("tools.single_step.load", load_once)


def test_outcomes_are_those_of_two_calls(shapes: SDXL) -> None:
    with torch.no_grad():
        pictures = drawn_pictures(shapes, 2)
        nothing, half = outcomes(shapes, pictures, ["at-edm:rho=0", "random:rho=0.5"], [500])
        noise = torch.randn(pictures.latents.shape, generator=torch.Generator().manual_seed(500))
        alpha = 1 / (1 + discrete_sigmas(shapes.config.noise)[500].double() ** 2)
        noisy = (alpha.sqrt() * pictures.latents + (1 - alpha).sqrt() * noise).float()
        calls = []
        for plan in (DENSE, parse_preset("random:rho=0.5").plan(49, 50, shapes.config.unet.attention_sites())):
            calls.append(shapes.unet(noisy, torch.tensor([500, 500]), pictures.text, pictures.vector, plan).double())
    expected = ((calls[1] - calls[0]) ** 2).mean() / ((calls[0] - noise) ** 2).mean()
    assert nothing.change == 0
    assert (nothing.objects_least, nothing.rest_mean, nothing.flops) == (1, 1, 1)
    print(f"change {half.change:.6f}, computed again {expected:.6f}")
    assert half.change == pytest.approx(float(expected), rel=1e-3)
    share = pictures.objects.mean().item()  # about: tokens are larger than pixels
    kept = share * half.objects_mean + (1 - share) * half.rest_mean
    print(f"objects cover {share:.3f} of the pictures; of all tokens {kept:.3f} stay, expected 0.5")
    assert kept == pytest.approx(0.5, abs=0.03)


def test_objects_are_where_something_is_drawn(shapes: SDXL) -> None:
    with torch.no_grad():
        objects = drawn_pictures(shapes, 3).objects
    assert set(objects.flatten().tolist()) == {0, 1}
    corners = objects[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.max() == 0  # objects keep their distance from the edge
    assert (objects.mean(dim=(1, 2, 3)) > 0.01).all()


def test_command_prints_a_table_and_leaves_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "one.csv"
    main(["--presets", "tome", "--timesteps", "300", "--pictures", "1", "--out", str(out)])
    assert "| `tome` |" in capsys.readouterr().out
    with out.open() as file:
        (row,) = csv.DictReader(file)
    assert (row["preset"], row["timestep"], float(row["objects_least"])) == ("tome", "300", 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pictures", "0"], "--pictures is 0, expected 1 or more"),
        (["--timesteps", "1000"], "--timesteps are [1000], expected 0 to 999"),
        (["--presets", "all"], "unknown preset 'all'"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", str(tmp_path / "one.csv")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
