"""The evaluation: its captions, its interval, and that a stopped run ends as one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.evaluate import main, read_rows, unseen_captions, wilson
from tools.shapes import held_out, parse_caption


def test_captions_are_unseen_different_and_always_the_same() -> None:
    captions = unseen_captions(60)
    assert len(set(captions)) == 60
    assert all(held_out(parse_caption(caption)) for caption in captions)
    assert unseen_captions(20) == captions[:20]


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],  # Newcombe 1998, table I, method 3
)
def test_interval_is_wilsons(successes: int, trials: int, low: float, high: float) -> None:
    found = wilson(successes, trials)
    print(f"{successes} of {trials}: {found[0]:.4f} to {found[1]:.4f}, there {low} to {high}")
    assert found == pytest.approx((low, high), abs=1e-4)


def test_stopped_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--steps", "1", "--presets", "dense", "at-edm:rho=0.3", "--batch", "1"]
    main([*settings, "--captions", "1", "--out", str(tmp_path / "stopped.csv")])
    main([*settings, "--captions", "2", "--out", str(tmp_path / "stopped.csv")])
    main([*settings, "--captions", "2", "--out", str(tmp_path / "straight.csv")])
    stopped, straight = (read_rows(tmp_path / name) for name in ("stopped.csv", "straight.csv"))
    assert sorted(stopped, key=str) == sorted(straight, key=str)
    assert [row["seed"] for row in straight] == ["0", "1", "0", "1"]
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(" | ")[0] for line in table] == ["| dense", "| at-edm:rho=0.3"]
