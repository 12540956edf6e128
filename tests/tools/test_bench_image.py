"""The timing of whole pictures, at a small size: what is measured is a picture, and what is said of it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tools.bench_image import main, table
from tools.benchmark.worker import StepTimes

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
SHAPES = Path(__file__).parents[2] / "weights" / "shapes" / "shapes.safetensors"


def test_both_libraries_make_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--weights", str(SHAPES), "--size", "64x64", "--steps", "4", "--repeats", "1", "--json"]
    small += ["--presets", "skip=deepcache", "--patches", "deepcache", "--out", str(tmp_path / "runs.json")]
    main(small)
    runs = json.loads(capsys.readouterr().out)["runs"]
    main(small)  # takes what is there
    assert json.loads(capsys.readouterr().out)["runs"] == runs
    assert runs.keys() == {"diffusers", "diffusers + deepcache", "dense", "skip=deepcache"}
    for (run,) in runs.values():
        assert 0 < run["picture"] < run["first_step"]  # four small steps beside a start of Python
    assert runs["skip=deepcache"][0]["flops"] < 0.7 * runs["dense"][0]["flops"]


def test_a_picture_is_added_up_from_steps_of_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--weights", str(SHAPES), "--size", "64x64", "--steps", "30", "--repeats", "1", "--json", "--each", "2"]
    main([*small, "--presets", "fast=fast", "--patches", "deepcache", "tomesd"])
    timed = {name: len(run["steps"]) for name, (run,) in json.loads(capsys.readouterr().out)["runs"].items()}
    # After the first step: two of one kind; W and S of WSSWSSW; W, n and the one 0 of W0WnnnWnnnnWnnn...
    expected = {"diffusers": 3, "dense": 3, "diffusers + tomesd": 3, "diffusers + deepcache": 7, "fast=fast": 7}
    assert timed == expected


def test_seconds_of_each_kind_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = {"W": 8.0, "n": 1.0}
    kinds = "WWnnWnnnnWnnnnnnn"
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run(each: int | None) -> tuple[float, float, int]:
        times = StepTimes(kinds, each)
        now[0] += 5  # text
        for step, kind in enumerate(kinds):
            now[0] += cost[kind]
            if times.ended(step):
                break
        now[0] += 3  # decoder
        picture = times.picture()
        return picture["picture"], picture["decoding"], len(picture["steps"])

    whole = 5 + sum(cost[kind] for kind in kinds) + 3
    assert run(None) == (whole, 3, len(kinds))
    assert run(1) == (whole, 3, 3)
    assert run(2) == (whole, 3, 5)
    assert run(99) == (whole, 3, len(kinds))


def test_measurements_of_other_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs.json"
    out.write_text(json.dumps({"machine": "another", "runs": {"diffusers": []}}))
    with pytest.raises(SystemExit) as stop:
        main(["--weights", str(SHAPES), "--out", str(out)])
    assert stop.value.code == 2
    assert "begun with other options or elsewhere" in capsys.readouterr().err


def test_table_has_ratios_of_one_round() -> None:
    runs = {
        "diffusers": [{"picture": 2.0, "first_step": 10.0}, {"picture": 4.0, "first_step": 10.0}],
        "dense": [{"picture": 1.0, "first_step": 5.0, "flops": 8}, {"picture": 3.0, "first_step": 9.0, "flops": 8}],
    }
    assert table(runs).splitlines()[3] == "| dense | 100.0% | 2.00 | 0.62 (0.50 to 0.75) | 7.00 | 0.70 (0.50 to 0.90) |"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0, expected 1 or more"),
        (["--presets", "fast"], "unknown preset 'fast'"),
        (["--presets", "steps=17"], "'steps=17' sets the steps"),
        (["--each", "0"], "--each is 0, expected 1 or more"),
        (["--each", "1", "--presets", "skip=sada"], "'skip=sada' decides as it goes"),
        (["--weights", "missing.safetensors"], "missing.safetensors does not exist"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
