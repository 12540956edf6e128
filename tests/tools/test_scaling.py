"""The fit of times to FLOPs, on times that are made up, and the command at a small size."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from minisdxl.config import SDXL_BASE
from minisdxl.cost import count
from tools.scaling import SPEEDS, Point, fit, main, table, work

TRUE = np.array([2e-12, 4e-12, 0.05])


def point(size: int, batch: int, speeds: NDArray[np.float64], preset: str = "dense") -> Point:
    return Point(preset, size, batch, (float(work(SDXL_BASE, Point(preset, size, batch, (), 0)) @ speeds),), 0)


def test_work_is_all_flops_of_the_batch() -> None:
    for preset in ("dense", "at-edm"):
        flops = work(SDXL_BASE, Point(preset, 512, 3, (), 0))
        assert len(flops) == len(SPEEDS) + 1
        assert flops[-1] == 1
        if preset == "dense":
            assert flops[:-1].sum() == 3 * count(SDXL_BASE, 64, 64).total


def test_fit_finds_the_speeds_that_times_were_made_with() -> None:
    found = fit(SDXL_BASE, [point(512, 1, TRUE), point(512, 2, TRUE), point(768, 1, TRUE), point(1024, 1, TRUE)])
    error = np.abs(found / TRUE - 1).max()
    print(f"speeds found to {error:.1e}")
    assert error < 1e-9


def test_table_shows_what_leaves_the_fit() -> None:
    slow = Point("dense", 512, 1, (2 * point(512, 1, TRUE).seconds,), 2**30)
    lines = table(SDXL_BASE, [slow, point(1024, 2, TRUE, "at-edm")], TRUE).splitlines()
    assert "| 2.00 |" in lines[2]
    assert lines[2].endswith("| 1.00 |")
    assert "| 1.00 |" in lines[3]
    assert lines[-1].endswith("convolution and linear 500 GFLOP/s, attention 250 GFLOP/s, 50 ms a call")


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--scale", "small", "--sizes", "64", "128", "--batches", "1", "2", "--repeats", "1", "--json"]
    main([*arguments, "--presets", "dissimilarity"])
    report = json.loads(capsys.readouterr().out)
    measured = [(each["preset"], each["size"], each["batch"]) for each in report["points"]]
    places = [(64, 1), (128, 1), (64, 2)]
    assert measured == [(preset, *place) for place in places for preset in ("dense", "dissimilarity")]
    assert all(time > 0 for each in report["points"] for time in each["times"])
    assert min(report["fit"]) >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats has 0, expected 1 or more"),
        (["--batches", "1", "0"], "--batches has 0, expected 1 or more"),
        (["--sizes", "100"], "100"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
