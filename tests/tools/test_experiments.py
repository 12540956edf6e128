"""The experiments: that they are possible, what is at equal cost in them, and what a run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from atedm.presets import parse_preset
from minisdxl.config import SHAPES
from minisdxl.cost import summary
from minisdxl.pipeline import SDXL
from tools.evaluation.experiment_specs import BASELINE, EXPERIMENTS, Claim, Experiment
from tools.evaluation.plots import AXES, LABEL, THUMBNAIL, family
from tools.evaluation.rows import read_rows
from tools.experiments import main, plan

TINY = Experiment(
    "A test.",
    presets=("at-edm", "zeros", "tome:r=0.3"),
    claims=(Claim("copies beat zeros", "at-edm", "zeros"), Claim("cannot be", "at-edm", "tome:r=0.3")),
    budgets=(0.9, 0.01),
    steps=(1, 2),
    axis="steps",
)
RUN = ("--captions", "2", "--batch", "2", "--size", "64x64", "--device", "cpu")


@pytest.fixture(autouse=True)
def few_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.evaluation.set_metrics.REFERENCES", 10)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch, load_once: Callable[..., SDXL]) -> None:
    monkeypatch.setattr("tools.experiments.load", load_once)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_claims_are_on_presets_that_cost_the_same(shapes: SDXL, name: str) -> None:
    experiment = EXPERIMENTS[name]
    assert BASELINE in experiment.presets or experiment.budgets == (None,)
    assert experiment.axis is None or experiment.axis in AXES
    for claim in experiment.claims:
        assert {claim.better, claim.worse} <= set(experiment.presets)
        assert claim.better != claim.worse
    parts, notes = plan(experiment, shapes, (256, 256))
    assert len(parts) == len(experiment.budgets) * len(experiment.cfgs) * len(experiment.steps)
    for part in parts:
        if part.share is None:  # methods that cost what they cost
            assert part.presets == {preset: preset for preset in experiment.presets}
            continue
        controls = [preset for preset in part.presets if preset.startswith("steps=")]
        assert len(controls) == (part.share < 1 - 0.5 / part.steps)
        for control in controls:
            assert abs(int(control.removeprefix("steps=")) / part.steps - part.share) <= 0.5 / part.steps + 1e-9
        for preset in (part.presets[name] for name in part.presets if name not in controls):
            calls = summary(SHAPES, 64, 64, parse_preset(preset), part.steps)
            share = calls["average"] / calls["dense"]
            assert part.share - 0.006 < share <= part.share + 5.1e-5, (preset, share)
    print(f"{name}: {[part.label for part in parts]}, {notes}")
    missing = {preset for part in parts for preset in experiment.presets if preset not in part.presets}
    assert missing == {preset for preset in experiment.presets if any(f"out of reach of {preset}:" in n for n in notes)}
    assert not missing or name in ("table-1", "figure-7")


def test_a_run_leaves_table_verdicts_numbers_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(EXPERIMENTS, "tiny", TINY)
    monkeypatch.setitem(EXPERIMENTS, "other", Experiment("Another.", ("at-edm",), (), budgets=(0.9,), steps=(2,)))
    folders = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    main(["tiny", *RUN, *folders])
    out = capsys.readouterr().out
    text = (tmp_path / "results" / "tiny.md").read_text()
    assert text in out
    print(text)
    assert f"python -m tools.experiments tiny {' '.join(RUN)}" in text
    report = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert report["settings"]["sha256"] in text
    assert "2 captions, 64x64 pixels, fp32, on " in text
    assert text.count("copies beat zeros: 90.0% of the FLOPs") == 2
    assert "cannot be" not in text  # the ratio of tome is given: no budget can be met with it
    assert text.count("out of reach") == 5  # of tome at any number of steps the same
    rows = read_rows(tmp_path / "runs" / "tiny.csv")
    assert sorted({(row.steps, family(row.preset)) for row in rows}) == [
        (steps, preset) for steps in (1, 2) for preset in ("at-edm", "dense", "zeros")
    ]
    assert len(rows) == 12
    assert len(report["presets"]) == 6
    assert [each["claim"].partition(":")[0] for each in report["verdicts"]] == ["copies beat zeros"] * 2
    assert np.asarray(Image.open(tmp_path / "results" / "tiny.png").convert("L")).std() > 5
    assert "tiny-pictures" not in text and not (tmp_path / "results" / "tiny-pictures.png").exists()  # along an axis

    made: list[Any] = []
    monkeypatch.setattr(SDXL, "generate", lambda *call, **_: made.append(call))
    main(["other", *RUN, *folders])  # of pictures that are there
    assert made == []
    assert len(read_rows(tmp_path / "runs" / "other.csv")) == 4
    assert "![pictures of other](other-pictures.png)" in (tmp_path / "results" / "other.md").read_text()
    sheet = Image.open(tmp_path / "results" / "other-pictures.png")
    assert sheet.size == (2 * THUMBNAIL, 2 * (THUMBNAIL + LABEL))  # dense and at-edm, of both captions


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, named in (
        (["nonesuch"], "nonesuch"),
        (["figure-9", "--captions", "0"], "--captions is 0"),
        (["figure-9", "--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["figure-9", "--table"], "no caption"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")])
        error = capsys.readouterr().err
        print(error, end="")
        assert (stop.value.code, error.count("\n")) == (2, 1)
        assert named in error
    assert not (tmp_path / "results").exists()
